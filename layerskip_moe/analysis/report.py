"""The report of a run: report.json, figures/*.png, and report.md, which is rendered from that same JSON.

A report is a dict of plain values. Every section is optional; what is absent is not told.

    command         str, the command line
    constants       {name: value}, main.py's
    machine         {name: value} as from `bench.describe_machine`, versions among them
    model           {parameters, active_parameters, config: {field: value}}
    corpus          {name, train_tokens, validation_tokens, vocab_size}
    training        {steps, seconds, tokens_per_second, final_losses: {exit layer: cross entropy},
                     best_validation: {step, perplexity} or None}
    exits           {perplexity: [...], agreement: [...], tokens} for exit layers 1..L, as `ExitEvaluation`
    decoding        [comparison, ...], each {temperature, top_p, max_new_tokens, prompts, seed, strategies}; a
                    strategy is {name, exit_layer, draft_length, tokens_per_second, prefill_seconds, speed_up,
                    speed_up_quartiles: (first, third), acceptance_rate, tokens_per_verification,
                    distinct_4grams, identical, first_differences}, the baseline first: plain decoding of the
                    same model. Made by `bench.DecodingComparison.as_report`.
    experts         {load: {layer: [E counts]}, metrics: {layer: {name: value}}, tokens}, as `ExpertUse`
    continuations   [{prompt, plain, self_speculative}, ...], texts
    seconds         {stage: seconds}

`write_report` adds `summary` (see `summarise`) and `figures` ({name: path within the folder}).
Knows nothing of how anything was measured. Next: `report_text.py`, which words it; `figures.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_moe.analysis import figures
from layerskip_moe.analysis.metrics_file import read_metrics
from layerskip_moe.analysis.report_text import render
from layerskip_moe.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS = (
    "command",
    "constants",
    "machine",
    "model",
    "corpus",
    "training",
    "exits",
    "decoding",
    "experts",
    "continuations",
    "seconds",
)


def write_report(out_dir: str | Path, report: Mapping[str, Any]) -> Path:
    """Write <out_dir>/report.json, report.md and figures/, each in one piece, and return report.md's path.

    report: as the module's docstring has it; a dataclass may stand for its dict. Values that JSON has no
    number for (inf, nan) become null, told as "-". Loss curves are drawn from <out_dir>/metrics.jsonl where
    there is one. Raises ValueError for a section of unknown name and for values that are not plain.
    """
    out_dir = Path(out_dir)
    unknown = [section for section in report if section not in SECTIONS]
    if unknown:
        raise ValueError(f"A report has no section {unknown}; its sections are {', '.join(SECTIONS)}.")
    try:
        # Through JSON and back, so that the text cannot state what the file does not hold.
        told = json.loads(json.dumps(_plain(report), allow_nan=False))
    except TypeError as error:
        raise ValueError(f"A report holds numbers, texts, lists and dicts only ({error}).") from error
    told["summary"] = summarise(told.get("decoding") or [])
    told["figures"] = _draw(out_dir, told)
    files = {"report.json": json.dumps(told, indent=1, allow_nan=False) + "\n", "report.md": render(told)}
    for name, text in files.items():
        with replacing(out_dir / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return out_dir / "report.md"


def summarise(decoding: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The headline of each comparison: its fastest strategy after the baseline, and how exact they all were.

    {decoding: "greedy" or the temperature, prompts, name, exit_layer, draft_length, speed_up,
    speed_up_quartiles, tokens_per_second, baseline_tokens_per_second, acceptance_rate, outputs: how many
    outputs of all strategies but the baseline, identical: how many of them equal the baseline's}.
    A comparison of the baseline alone has no headline.
    """
    headlines = []
    for comparison in decoding:
        baseline, *others = comparison["strategies"]
        if not others:
            continue
        best = max(others, key=lambda row: row["speed_up"])
        told = ("name", "exit_layer", "draft_length", "speed_up", "speed_up_quartiles", "tokens_per_second")
        headlines.append(
            {
                "decoding": figures.decoding_label(comparison),
                "prompts": comparison["prompts"],
                **{field: best[field] for field in told},
                "acceptance_rate": best["acceptance_rate"],
                "baseline_tokens_per_second": baseline["tokens_per_second"],
                "outputs": comparison["prompts"] * len(others),
                "identical": sum(row["identical"] for row in others),
            }
        )
    return headlines


def _draw(out_dir: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """Draw what the report has the data for: figure's name -> path within out_dir."""
    paths = {}

    def save(name: str, figure: "Figure") -> None:
        paths[name] = f"figures/{name}.png"
        figures.save_figure(figure, out_dir / paths[name])

    metrics = out_dir / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    train = [record for record in records if record["split"] == "train"]
    if train:
        validation = [record for record in records if record["split"] == "validation"]
        save("loss", figures.loss_curves(train, validation))
    exits = report.get("exits")
    if exits:
        save("perplexity_by_exit", figures.perplexity_by_exit(exits["perplexity"], exits["agreement"]))
    rows = [row for comparison in report.get("decoding") or [] for row in comparison["strategies"]]
    if any(row["exit_layer"] is not None for row in rows):
        save("speed_up_by_exit", figures.speed_up_by_exit(report["decoding"]))
    load = (report.get("experts") or {}).get("load")
    if load:
        save("expert_load", figures.expert_heat_map(load))
    return paths


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, paths as texts, and None for numbers that JSON does not have."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""The report of a run: report.json, figures/*.png, and report.md, which is rendered from that same JSON.

A report is a dict of plain values. Every section is optional; what is absent is not told.

    command         str, the command line
    constants       {name: value}, main.py's
    machine         {name: value} as from `bench.describe_machine`, versions among them
    model           {parameters, active_parameters, config: {field: value}}
    corpus          {name, train_tokens, validation_tokens, vocab_size}
    training        {steps, seconds, tokens_per_second, final_losses: {exit layer: cross entropy},
                     best_validation: {step, perplexity} or None,
                     seconds_by_part: {part of a step: mean seconds per step} or None,
                     skipped_steps: those whose loss or gradient was not finite, where there are any}; nothing but
                    the last two where only metrics.jsonl is known of the training
    recipe          {steps, n_layers, train_config: {field: value}}, as training writes it to recipe.json
    exits           {perplexity: [...], agreement: [...], tokens} for exit layers 1..L, as `ExitEvaluation`
    decoding        [comparison, ...], each {temperature, top_p, max_new_tokens, prompts, seed, strategies}, the
                    strategies' first the baseline: plain decoding of the same model; the others draft and
                    verify. Made by `bench.DecodingComparison.as_report`. A strategy is
                    {name, exit_layer, draft_length, threshold: early exit's, tokens_per_second, prefill_seconds,
                     speed_up, speed_up_quartiles: (first, third), mean_layers: run per new token,
                     drafted, accepted, acceptance_rate, tokens_per_verification,
                     drafted_by_position, accepted_by_position: [tokens, by place in their round],
                     perplexity, agreement: of what it wrote, under the full model, as `ContinuationScore`,
                     distinct_4grams, identical, first_differences}, None where a strategy has no such thing
    strategies      [comparison, ...] as above: every way to decode side by side, lossless or not
    sweep           {temperature, top_p, prompts, max_new_tokens, exit_layers: [...], draft_lengths: [...],
                     speed_up, acceptance_rate: [per exit layer][per draft length], identical, outputs,
                     chosen: {exit_layer, draft_length}, by_position: [...]}, as `DraftingSweep`: medians over
                     prompts, which are others than `decoding`'s
    early_exit      {confidence, min_layer, cache: "propagate" or "exact",
                     held_out: {thresholds, mean_layers, perplexity, agreement: [per threshold],
                                exits: [L counts per threshold], confidence_mean, confidence_low,
                                confidence_high: [L], tokens}, as `EarlyExitEvaluation`,
                     decoding: a comparison, the baseline and a strategy per threshold,
                     by_prompt: {threshold, exits: [L counts of new tokens per prompt]} or None}
    experts         {load: {layer: [E counts]}, metrics: {layer: {name: value}}, tokens}, as `ExpertUse`
    expert_choice   {layers: {layer: {token_dependence, chance, experts: [[{text, share, lift, count}, best
                     first] per expert]}}, tokens}, as `ExpertChoice`
    comparison      {steps, seed, runs: [with LayerSkip, without]}, each {name, perplexity: [L],
                     agreement: [L], best_step, experts: {layer: balance metrics}, decoding: [comparison, ...],
                     seconds}
    continuations   [{prompt, plain, self_speculative}, ...], texts
    seconds         {stage: seconds}

From the folder of a training run come `recipe` (recipe.json), `seconds_by_part` and `skipped_steps` (metrics.jsonl)
where they are not given. `write_report` adds

    summary         the headline of each comparison in `decoding`, see `findings.summarise`
    findings        what the sentences claim, by section; each a function of `findings.py`
    figures         {name: path within the folder}

Knows nothing of how anything was measured. Next: `report_text/`, which words it; `report_figures.py`, which
draws it; `findings.py`.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_moe.analysis.findings import (
    acceptance_by_position,
    balance_over_training,
    best_threshold,
    compare_runs,
    mean_seconds_by_part,
    resolution,
    summarise,
    sweep_lead,
)
from layerskip_moe.analysis.metrics_file import read_metrics
from layerskip_moe.analysis.recipe_schedule import RecipeSchedule, recipe_schedule
from layerskip_moe.analysis.report_figures import draw_figures
from layerskip_moe.analysis.report_text import render
from layerskip_moe.files import plain, replacing

SECTIONS = (
    "command",
    "constants",
    "machine",
    "model",
    "corpus",
    "training",
    "recipe",
    "exits",
    "decoding",
    "strategies",
    "sweep",
    "early_exit",
    "experts",
    "expert_choice",
    "comparison",
    "continuations",
    "seconds",
)


def write_report(out_dir: str | Path, report: Mapping[str, Any], *, run_dir: str | Path | None = None) -> Path:
    """Write <out_dir>/report.json, report.md and figures/, each in one piece, and return report.md's path.

    report: as the module's docstring has it; a dataclass may stand for its dict. Values that JSON has no
    number for (inf, nan) become null, told as "-".
    run_dir: the folder of the model's training run, None: out_dir; what training wrote there, metrics.jsonl and
    recipe.json, is drawn and told where it is there, and left out with a warning where its network has another
    number of layers than the model.

    Raises ValueError for a section of unknown name, for values that are not plain, and for a damaged file of
    training's.
    """
    out_dir = Path(out_dir)
    unknown = [section for section in report if section not in SECTIONS]
    if unknown:
        raise ValueError(f"A report has no section {unknown}; its sections are {', '.join(SECTIONS)}.")
    try:
        # Through JSON and back, so that the text cannot state what the file does not hold.
        told = json.loads(json.dumps(plain(report), allow_nan=False))
    except TypeError as error:
        raise ValueError(f"A report holds numbers, texts, lists and dicts only ({error}).") from error
    recipe, records = _training_run(out_dir if run_dir is None else Path(run_dir), told.get("model") or {})
    train = [record for record in records if record["split"] == "train"]
    if not told.get("recipe") and recipe:
        told["recipe"] = recipe
    schedule = recipe_schedule(told["recipe"]) if told.get("recipe") else None
    training, seconds = told.get("training") or {}, mean_seconds_by_part(train)
    if not training.get("seconds_by_part") and (training or seconds):
        training |= {"seconds_by_part": seconds}
    if skipped := sum(record["split"] == "skipped" for record in records):
        training = {"skipped_steps": skipped} | training
    if training:
        told["training"] = training

    told["summary"] = summarise(told.get("decoding") or [])
    told["findings"] = plain(_findings(told, train, schedule))
    told["figures"] = draw_figures(out_dir, told, records, schedule)
    files = {"report.json": json.dumps(told, indent=1, allow_nan=False) + "\n", "report.md": render(told)}
    for name, text in files.items():
        with replacing(out_dir / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return out_dir / "report.md"


def _findings(
    report: Mapping[str, Any], train: Sequence[Mapping[str, Any]], schedule: RecipeSchedule | None
) -> dict[str, Any]:
    """`findings`, of the sections that are there."""
    early_exit, comparison = report.get("early_exit"), report.get("comparison")
    found = {
        "acceptance_by_position": acceptance_by_position(report.get("decoding") or [], report.get("sweep")),
        "sweep": sweep_lead(report["sweep"]) if report.get("sweep") else None,
        "strategies": resolution(report["strategies"]) if report.get("strategies") else None,
        "early_exit": best_threshold(early_exit["held_out"]) if early_exit else None,
        "recipe": {
            "curriculum_steps": len(schedule.curriculum_steps),
            "highest_dropout": max(map(max, schedule.rates)),
        }
        if schedule
        else None,
        "balance_over_training": balance_over_training(train),
        "comparison": compare_runs(comparison) if comparison else None,
    }
    return {name: value for name, value in found.items() if value}


def _training_run(folder: Path, model: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The recipe (or None) and the records (or none) that a training run left in folder; neither where they are
    not of a report's `model`."""
    recipe, metrics = _recipe(folder / "recipe.json"), folder / "metrics.jsonl"
    n_layers = (model.get("config") or {}).get("n_layers")
    if recipe and n_layers is not None and recipe["n_layers"] != n_layers:
        warnings.warn(
            f"the training run in '{folder}' was of a network of {recipe['n_layers']} layers, and this model has "
            f"{n_layers}, so the report leaves the run out.",
            stacklevel=3,
        )
        return None, []
    return recipe, read_metrics(metrics) if metrics.is_file() else []


def _recipe(path: Path) -> Any:
    """What training wrote down of its recipe; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not the JSON that training writes ({error}); mend or remove it.") from error
    if not isinstance(recipe, dict) or not {"steps", "n_layers", "train_config"} <= set(recipe):
        raise ValueError(f"'{path}' is not the JSON that training writes (fields are missing); mend or remove it.")
    return recipe

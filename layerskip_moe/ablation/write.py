"""ablation.json, ablation.md and its figures, from the results of an ablation's runs.

    ablation.json   {"command", "corpus", "measures", "decoding", "base": as `ablate` got them,
                     "machine": what was timed on, None before that, "seeds", "variants": {name: what it changes},
                     "summary": see `summarise`, "runs": [result.json of each, but for its settings, with `decoding` of
                     decoding.json], "figures"}

Knows nothing of how anything was measured. Next: `summary.py`; `analysis/figures/ablation.py`, which draws.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_moe.ablation.summary import RELATIVE, TOLERATED, summarise
from layerskip_moe.ablation.variants import BASE
from layerskip_moe.analysis.figures import ablation_tradeoff, ablation_unions, save_figure
from layerskip_moe.analysis.report_text.markdown import code, counted, figure, listed, number, percent, table
from layerskip_moe.files import plain, replacing

_QUALITY = ("perplexity", "agreement")
_SPEED = {
    "speed_up": "speed-up",
    "acceptance": "drafts accepted",
    "tokens_per_second": "tokens/s",
    "plain_tokens_per_second": "plain decoding's tokens/s",
    "distinct_4grams": "distinct 4-grams",
}
_SHARES = ("agreement", "acceptance", "distinct_4grams")


def write_ablation(out_dir: Path, about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Path:
    """Write all of it, each file in one piece; ablation.md's path. about: ablation.json's fields before machine.
    results: result.json's contents, with `decoding` and `timed_on` of decoding.json, None where that is not there."""
    told = plain(
        {
            **about,
            "machine": next((result["timed_on"] for result in results if result["timed_on"]), None),
            "seeds": sorted({result["seed"] for result in results}),
            "variants": {result["variant"]: result["changes"] for result in results},
            "summary": summarise(results),
            "runs": [
                {name: of[name] for name in of if name not in ("setting", "changes", "timed_on")} for of in results
            ],
        }
    )
    told = json.loads(json.dumps(told, allow_nan=False))  # so that the text cannot state what the file does not hold
    told["figures"] = _draw(out_dir, told)
    files = {"ablation.json": json.dumps(told, indent=1, allow_nan=False) + "\n", "ablation.md": ablation_text(told)}
    for name, text in files.items():
        with replacing(out_dir / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return out_dir / "ablation.md"


def _draw(out_dir: Path, told: Mapping[str, Any]) -> dict[str, str]:
    """The figures that there is data for: name -> path within out_dir."""
    rows = [row for row in told["summary"] if row["seeds"]]
    drawn = {}
    timed = [row["mean"].get(name) for row in rows for name in row["mean"] if name.startswith("tokens_per_second_")]
    if rows and rows[0]["variant"] == BASE and any(value is not None for value in timed):
        drawn["tradeoff"] = ablation_tradeoff(rows, tolerated=TOLERATED)
    if any(value is not None for row in rows for name, value in row["mean"].items() if name.startswith("union_")):
        union = next(run["union"] for run in told["runs"] if not run["failed"] and run["union"]["independent"])
        drawn["unions"] = ablation_unions(rows, dict(zip(union["spans"], union["independent"], strict=True)))
    for name, picture in drawn.items():
        save_figure(picture, out_dir / "figures" / f"{name}.png")
    return {name: f"figures/{name}.png" for name in drawn}


def ablation_text(told: Mapping[str, Any]) -> str:
    """ablation.md, of what ablation.json holds."""
    rows = told["summary"]
    finished = [run for run in told["runs"] if not run["failed"]]
    lines = ["# Ablation", "", *_setting(told, finished)]
    lines += _verdict(rows)
    lines += ["## Means over seeds", "", *_means(rows), *_failures(told["runs"])]
    lines += ["## Paired differences from the base", "", *_differences(rows)]
    lines += figure(told, "tradeoff", "Perplexity against tokens/s")
    lines += figure(told, "unions", "Experts that adjacent rows need")
    lines += ["## What was changed", "", *_changes(told["variants"])]
    return "\n".join(lines).rstrip() + "\n"


def _setting(told: Mapping[str, Any], finished: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"Written by {code(told['command'])}.", ""] if told["command"] else []
    if not finished:
        return [*lines, "No run has finished.", ""]
    network, first = told["base"]["network"], finished[0]
    return [
        *lines,
        f"Base: {network['n_layers']} layers of width {network['d_model']}, {network['num_experts']} experts of which "
        f"{network['top_k']} are chosen; every run {number(first['steps'])} steps, {number(first['tokens'])} tokens of "
        f"{told['corpus']['name']}. Runs of a seed share first weights (where shapes are equal), batches and dropout.",
        "",
        *_timing(told, finished),
    ]


def _timing(told: Mapping[str, Any], finished: Sequence[Mapping[str, Any]]) -> list[str]:
    lines, machine = [], told["machine"]
    if machine is not None:
        cores = f"{machine['cores']} cores" if machine["accelerator"] is None else machine["accelerator"]
        lines = [
            f"Timed on {machine['cpu']}, {cores}, torch {machine['versions'].get('torch')}, with the same prompts for "
            "all runs. Tokens/s are of the exit layer and draft length that were fastest on other prompts, speed-ups "
            "over plain decoding of the same model.",
            "",
        ]
    untimed = [run for run in finished if not run["decoding"]]
    if untimed:
        lines += [
            f"Decoding of {counted(len(untimed), 'run')} is not timed yet: give the command that trained them again, "
            "without --no-timing, on a machine that does nothing else.",
            "",
        ]
    return lines


def _verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the differences prove: in a sentence, and for each variant."""
    judged = [row for row in rows if row["quality"]]
    if not judged:
        return []
    lines = ["## What is shown", ""]
    at = list(dict.fromkeys(temperature for row in judged for temperature in row["speed"]))
    if at:
        paying = [f"{row['variant']} (temperature {listed(row['pays'])})" for row in judged if row["pays"]]
        tests = sum(len(row["speed"]) for row in judged)
        lines += [
            f"More tokens/s by the fastest pair than by the base's fastest pair (p below 0.05 by Holm's correction for "
            f"{counted(tests, 'comparison')}), with the whole 95% interval of final perplexity within "
            f"{percent(TOLERATED)} of the base's: {listed(paying) if paying else 'none of the variants'}.",
            "",
        ]
    told = []
    for row in judged:
        perplexity = row["difference"]["perplexity"]
        cells = [f"{100 * perplexity['mean']:+.1f}%", f"{100 * perplexity['high']:+.1f}%", _shown(row["quality"])]
        for temperature in at:
            speed, of = row["speed"].get(temperature), row["difference"].get(f"tokens_per_second_{temperature}")
            cells.append("-" if speed is None else f"{100 * of['mean']:+.1f}%, p {speed['p']:.2g}: {speed['verdict']}")
        told.append([row["variant"], *cells])
    speeds = [f"tokens/s, {_temperature(temperature)}" for temperature in at]
    return lines + table(["variant", "final perplexity", "upper end", "verdict", *speeds], told)


def _shown(quality: str) -> str:
    """ "within 2.0%", "over 2.0%" or "not shown"."""
    return quality if quality == "not shown" else f"{quality} {percent(TOLERATED)}"


def _temperature(at: str) -> str:
    return "greedy" if at == "0" else f"temperature {at}"


def _means(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of quality, and one of routing and speed."""
    lines = []
    for measures in _measures(rows, "mean"):
        told = [
            [
                row["variant"],
                str(len(row["seeds"])),
                f"{row['parameters'] / 1e6:.1f}M ({row['active_parameters'] / 1e6:.1f}M)",
                *(_value(name, row["mean"].get(name)) for name in measures),
            ]
            for row in rows
        ]
        lines += table(["variant", "seeds", "parameters (used per token)", *map(_title, measures)], told)
    return lines


def _measures(rows: Sequence[Mapping[str, Any]], of: str) -> list[list[str]]:
    """The names of what was measured: of quality, then of routing and speed."""
    names = list(dict.fromkeys(name for row in rows for name in row[of]))
    quality = [name for name in names if name.startswith(_QUALITY)]
    return [part for part in (quality, [name for name in names if name not in quality]) if part]


def _failures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [f"- {run['variant']}, seed {run['seed']}: {run['failed']}" for run in runs if run["failed"]]
    return ["Failed:", "", *failed, ""] if failed else []


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [row for row in rows if row["difference"]]
    if not rows:
        return [f"There is nothing yet to compare with the {BASE}.", ""]
    most = max(of["pairs"] for row in rows for of in row["difference"].values())
    lines = [
        f"Paired by seed, at most {counted(most, 'pair')}: mean, and Student's 95% interval in brackets where there "
        "are two or more; bold where that leaves out 0, as one in twenty does by chance. Perplexities and tokens/s in "
        "% of the base's, shares in percentage points.",
        "",
    ]
    for measures in _measures(rows, "difference"):
        told = [
            [row["variant"], *(_difference(name, row["difference"].get(name)) for name in measures)] for row in rows
        ]
        lines += table(["variant", *map(_title, measures)], told)
    return lines


def _changes(variants: Mapping[str, Any]) -> list[str]:
    def words(changes: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={value}" for name, value in changes.items()) or "-"

    rows = [[name, words(variant["network"]), words(variant["recipe"])] for name, variant in variants.items()]
    return table(["variant", "of the network", "of the recipe"], rows)


def _title(measure: str) -> str:
    """perplexity_quarter -> perplexity at 1/4 of the layers."""
    what, _, where = measure.rpartition("_")
    if where in ("quarter", "half"):
        return f"{what} at {'1/4' if where == 'quarter' else '1/2'} of the layers"
    if what == "union":
        return f"experts of {where} rows / of one"
    if what not in _SPEED:
        return measure
    return f"{_SPEED[what]}, {_temperature(where)}"


def _value(measure: str, value: float | None) -> str:
    if measure.startswith(_SHARES):
        return percent(value)
    return number(value, 1 if measure.startswith(("perplexity", "tokens", "plain_tokens")) else 2)


def _difference(measure: str, of: Mapping[str, Any] | None) -> str:
    """ "+1.2 [0.3, 2.1]", bold where the interval leaves out 0."""
    if of is None:
        return "-"
    factor, digits = (100, 1) if measure.startswith((*RELATIVE, *_SHARES)) else (1, 2)
    unit = "%" if measure.startswith(RELATIVE) else ""
    told = f"{factor * of['mean']:+.{digits}f}{unit}"
    if of["low"] is None:
        return told
    sure = of["low"] > 0 or of["high"] < 0
    interval = f"[{factor * of['low']:.{digits}f}, {factor * of['high']:.{digits}f}]"
    return f"**{told}** {interval}" if sure else f"{told} {interval}"

"""What a report's sentences claim, as numbers: means, shares and choices made from the report's own sections.

They are kept in report.json, so that report.md states nothing that the file does not hold. "Even" and its
measures are `training/balance.py`'s. Knows nothing of wording. Next: `report_text/`, which chooses its words
by these; `report.py`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from layerskip_moe.training.balance import balance_metrics

_LEAST_AGREEMENT = 0.95  # with the last layer, for a threshold of early exit to be recommended
_BALANCE = ("max_violation", "normalized_entropy", "dead_experts")


def decoding_label(comparison: Mapping[str, Any]) -> str:
    """How a comparison's tokens were chosen: "greedy", or its temperature and top-p."""
    if comparison["temperature"] == 0:
        return "greedy"
    top_p = "" if comparison.get("top_p") is None else f", top-p {comparison['top_p']:g}"
    return f"temperature {comparison['temperature']:g}{top_p}"


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
                "decoding": decoding_label(comparison),
                "prompts": comparison["prompts"],
                **{field: best[field] for field in told},
                "acceptance_rate": best["acceptance_rate"],
                "baseline_tokens_per_second": baseline["tokens_per_second"],
                "outputs": comparison["prompts"] * len(others),
                "identical": sum(row["identical"] for row in others),
            }
        )
    return headlines


def acceptance_by_position(decoding: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{decoding, name, accepted: [share of the i-th drafts accepted]} of every strategy that drafted."""
    found = []
    for comparison in decoding:
        for row in comparison["strategies"]:
            counts = zip(row.get("drafted_by_position") or [], row.get("accepted_by_position") or [], strict=True)
            shares = [accepted / drafted for drafted, accepted in counts if drafted]
            if shares:
                found.append({"decoding": decoding_label(comparison), "name": row["name"], "accepted": shares})
    return found


def best_threshold(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """The early-exit threshold that saves most layers on held-out text and still agrees with the last layer.

    {least_agreement: the share of positions that counts as agreeing, n_layers, threshold and mean_layers: None
    where no threshold that saves layers agrees so often}.
    """
    n_layers = len(held_out["exits"][0])
    columns = (held_out["mean_layers"], held_out["thresholds"], held_out["agreement"])
    kept = [
        (mean, threshold)
        for mean, threshold, agreement in zip(*columns, strict=True)
        if agreement >= _LEAST_AGREEMENT and mean < n_layers
    ]
    mean, threshold = min(kept, default=(None, None))
    return {"least_agreement": _LEAST_AGREEMENT, "n_layers": n_layers, "threshold": threshold, "mean_layers": mean}


def balance_over_training(train: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The balance in the first and in the last train record that has a load, means over layers.

    {steps: (first, last), and so for max_violation, normalized_entropy and dead_experts}; None without two
    such records, or where a record's layers had no choice to make.
    """
    loaded = [record for record in train if record.get("load")]
    if len(loaded) < 2:
        return None
    ends = (loaded[0], loaded[-1])
    first, last = (
        _mean_balance(balance_metrics(torch.tensor(counts)) for counts in record["load"].values()) for record in ends
    )
    if first is None or last is None:
        return None
    return {"steps": [record["step"] for record in ends], **{name: [first[name], last[name]] for name in _BALANCE}}


def compare_runs(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs can be compared by.

    {runs: [{balance: means over layers or None, decoding: `summarise` of the run's}, ...],
    layers: how many layers hold experts in both, more_even: in how many of them MaxVio is lower in the first}.
    """
    runs = comparison["runs"]
    first, second = (run.get("experts") or {} for run in runs)
    both = [(first[layer]["max_violation"], second[layer]["max_violation"]) for layer in first if layer in second]
    measured = [pair for pair in both if None not in pair]
    return {
        "runs": [
            {
                "balance": _mean_balance((run.get("experts") or {}).values()),
                "decoding": summarise(run["decoding"]),
            }
            for run in runs
        ],
        "layers": len(measured),
        "more_even": sum(with_ < without for with_, without in measured),
    }


def mean_seconds_by_part(train: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean seconds of each part of a training step over all steps that were timed; None if none was.

    A record's `seconds` are means over the steps since the record before it, and count for as many.
    """
    totals: dict[str, float] = {}
    timed = 0
    before = -1
    for record in train:
        steps, before = record["step"] - before, record["step"]
        if record.get("seconds"):
            timed += steps
            for part, seconds in record["seconds"].items():
                totals[part] = totals.get(part, 0.0) + steps * seconds
    return {part: seconds / timed for part, seconds in totals.items()} if timed else None


def _mean_balance(layers: Iterable[Mapping[str, float | None]]) -> dict[str, float] | None:
    """Means over layers of the measures of balance; layers without a choice (nan or None) do not count."""
    used = [row for row in layers if row["max_violation"] is not None and not math.isnan(row["max_violation"])]
    if not used:
        return None
    return {name: sum(row[name] or 0.0 for row in used) / len(used) for name in _BALANCE}

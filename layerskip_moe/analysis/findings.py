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
_MOST_LAYERS = 0.75  # share of the layers that must agree for a verdict on two runs' balance
_SMALL_LEAD = 0.1  # of a sweep's best setting over the next: the few prompts of a sweep do not tell less apart
# What a few hundred tokens do not tell apart: shares in percentage points.
_MARGINS = {"perplexity_ratio": 0.15, "agreement_points": 6, "distinct_4grams_points": 5}
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
    speed_up_quartiles, tokens_per_second, distinct_4grams, baseline_tokens_per_second, acceptance_rate, settings:
    how many strategies there are but the baseline, outputs: how many outputs of theirs, identical: how many of
    them equal the baseline's}.
    A comparison of the baseline alone has no headline.
    """
    headlines = []
    for comparison in decoding:
        baseline, *others = comparison["strategies"]
        if not others:
            continue
        best = max(others, key=lambda row: row["speed_up"])
        told = (
            *("name", "exit_layer", "draft_length", "speed_up", "speed_up_quartiles"),
            *("tokens_per_second", "distinct_4grams"),
        )
        headlines.append(
            {
                "decoding": decoding_label(comparison),
                "prompts": comparison["prompts"],
                **{field: best[field] for field in told},
                "acceptance_rate": best["acceptance_rate"],
                "baseline_tokens_per_second": baseline["tokens_per_second"],
                "settings": len(others),
                "outputs": comparison["prompts"] * len(others),
                "identical": sum(row["identical"] for row in others),
            }
        )
    return headlines


def acceptance_by_position(
    decoding: Sequence[Mapping[str, Any]], sweep: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """{decoding, name, accepted: [share of the i-th drafts accepted]} of every strategy that drafted, and then of
    every exit layer of the sweep at its longest draft length."""
    drafted = [
        (decoding_label(comparison), row["name"], row) for comparison in decoding for row in comparison["strategies"]
    ]
    for row in (sweep or {}).get("by_position") or []:
        drafted.append((decoding_label(sweep or {}), f"sweep, exit layer {row['exit_layer']}", row))
    found = []
    for label, name, row in drafted:
        counts = zip(row.get("drafted_by_position") or [], row.get("accepted_by_position") or [], strict=True)
        shares = [accepted / drafted for drafted, accepted in counts if drafted]
        if shares:
            found.append({"decoding": label, "name": name, "accepted": shares})
    return found


def sweep_lead(sweep: Mapping[str, Any]) -> dict[str, Any] | None:
    """The setting that comes next to the chosen one: {exit_layer, draft_length, speed_up, small: whether the
    chosen one's lead over it is 10% or less}. None where no other was measured."""
    measured = {
        (layer, length): sweep["speed_up"][i][j]
        for i, layer in enumerate(sweep["exit_layers"])
        for j, length in enumerate(sweep["draft_lengths"])
        if sweep["speed_up"][i][j] is not None
    }
    chosen = measured.pop((sweep["chosen"]["exit_layer"], sweep["chosen"]["draft_length"]), None)
    if chosen is None or not measured:
        return None
    layer, length = max(measured, key=lambda place: measured[place])
    speed_up = measured[layer, length]
    small = chosen <= (1 + _SMALL_LEAD) * speed_up
    return {"exit_layer": layer, "draft_length": length, "speed_up": speed_up, "small": small}


def resolution(strategies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many tokens a strategy wrote in each comparison, and the differences that so few do not tell apart.

    The margins are rough: they are about what a few hundred sampled tokens vary by, and are not computed from these.
    """
    return {"tokens": [entry["prompts"] * entry["max_new_tokens"] for entry in strategies], **_MARGINS}


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

    {steps: (first, last), how many were done; and so for max_violation, normalized_entropy and dead_experts}; None
    without two such records, or where a record's layers had no choice to make.
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
    return {"steps": [record["step"] + 1 for record in ends], **{name: [first[name], last[name]] for name in _BALANCE}}


def compare_runs(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs can be compared by.

    {runs: [{balance: means over layers or None, decoding: `summarise` of the run's}, ...],
    layers: how many layers hold experts in both, more_even: in how many of them MaxVio is lower in the first,
    balance: "better" or "worse" in the first where the means of MaxVio and of entropy and the MaxVio of three
    layers in four say so alike; None where they do not}.
    """
    runs = comparison["runs"]
    first, second = (run.get("experts") or {} for run in runs)
    both = [(first[layer]["max_violation"], second[layer]["max_violation"]) for layer in first if layer in second]
    measured = [pair for pair in both if None not in pair]
    balances = [_mean_balance((run.get("experts") or {}).values()) for run in runs]
    more_even = sum(with_ < without for with_, without in measured)
    less_even = sum(with_ > without for with_, without in measured)
    return {
        "runs": [
            {"balance": balance, "decoding": summarise(run["decoding"])}
            for balance, run in zip(balances, runs, strict=True)
        ],
        "layers": len(measured),
        "more_even": more_even,
        "balance": _balance_verdict(balances, more_even / len(measured), less_even / len(measured))
        if measured
        else None,
    }


def _balance_verdict(balances: Sequence[dict[str, float] | None], more_even: float, less_even: float) -> str | None:
    """Of two runs' means, and the shares of layers in which the first is the more and the less even."""
    first, second = balances
    if first is None or second is None:
        return None
    violation = first["max_violation"] - second["max_violation"]  # falls with evenness
    entropy = first["normalized_entropy"] - second["normalized_entropy"]  # rises with it
    if violation < 0 < entropy and more_even >= _MOST_LAYERS:
        return "better"
    if entropy < 0 < violation and less_even >= _MOST_LAYERS:
        return "worse"
    return None


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

"""The results of an ablation's runs side by side: means over seeds, paired differences from the base, and what they
prove.

L layers. Knows nothing of how anything was trained or measured. Next: `write.py`, which tells it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from layerskip_moe.ablation.variants import BASE
from layerskip_moe.analysis.paired import holm, paired_difference

TOLERATED = 0.02  # of final perplexity: what a change may cost that buys speed
_RISK = 0.05  # of calling anything faster or slower that is not
_SPEED = "tokens_per_second_"
# Speeds go as shares of the base's: unlike speed-ups over a model's own plain decoding, they compare networks too.
RELATIVE = ("perplexity", _SPEED, "plain_" + _SPEED)


def measures_of(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers that a run is compared by; None for one that could not be measured. Those with a temperature are
    there only where the run was timed.

    perplexity: of the whole model
    perplexity_quarter, perplexity_half, agreement_quarter, agreement_half: at the exit after a quarter and a half
        of the layers, rounded up
    union_<span>: experts that so many adjacent rows need over those of one row, a shared expert among both
    speed_up_<temperature>, acceptance_<temperature>, tokens_per_second_<temperature>: of the fastest pair
    plain_tokens_per_second_<temperature>: of plain decoding
    distinct_4grams_<temperature>: of what the pair wrote; text that loops is easy to draft
    """
    exits, union, network = result["exits"], result["union"], result["setting"]["network"]
    n_layers = len(exits["perplexity"])
    found: dict[str, float | None] = {"perplexity": exits["perplexity"][-1]}
    for name, layer in (("quarter", -(-n_layers // 4)), ("half", -(-n_layers // 2))):
        found[f"perplexity_{name}"] = exits["perplexity"][layer - 1]
        found[f"agreement_{name}"] = exits["agreement"][layer - 1]
    over_top_k = union["over_top_k"] or [None] * len(union["spans"])  # of a dense model, nothing
    shared = network["shared_expert_d_ff"] / (network["top_k"] * network["d_ff"])
    for span, value in zip(union["spans"], over_top_k, strict=True):
        found[f"union_{span}"] = None if value is None else (value + shared) / (1 + shared)
    for decoding in result["decoding"] or ():
        at = f"{decoding['temperature']:g}"
        found[f"speed_up_{at}"] = decoding["speed_up"]
        found[f"acceptance_{at}"] = decoding["acceptance_rate"]
        found[f"tokens_per_second_{at}"] = decoding["tokens_per_second"]
        found[f"plain_tokens_per_second_{at}"] = decoding["plain_tokens_per_second"]
        found[f"distinct_4grams_{at}"] = decoding["distinct_4grams"]
    return found


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant, the base first, then in the order in which they first occur:

    variant, parameters, active_parameters, seeds: those with a result, failed: those whose training diverged
    mean: {measure: mean over seeds}, see `measures_of`
    difference: {measure: `PairedDifference` from the base over the seeds that both have}, of perplexities and
        tokens/s as shares of the base's; {} for the base, and where there are no pairs
    quality: of final perplexity's 95% interval: "within" if all of it is at most TOLERATED above the base's, "over" if
        all is above that, else "not shown"; None where no interval is known
    speed: {temperature: {p, verdict}} of the fastest pair's tokens/s beside those of the base's fastest pair: p
        adjusted by Holm for all variants and temperatures; "faster" or "slower" if it is below 0.05, else "not shown";
        where no interval is known, nothing
    pays: temperatures at which it is "faster", if its quality is "within"; None where either is not known
    """
    by_variant: dict[str, dict[int, Mapping[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["variant"] != BASE):
        by_variant.setdefault(result["variant"], {})[result["seed"]] = result
    rows = []
    base = _measured(by_variant.get(BASE, {}))
    for name, of in by_variant.items():
        found = _measured(of)
        difference = {} if name == BASE else _differences(found, base)
        first = next(iter(of.values()))
        rows.append(
            {
                "variant": name,
                "parameters": first["parameters"],
                "active_parameters": first["active_parameters"],
                "seeds": list(found),
                "failed": [seed for seed, result in of.items() if result["failed"]],
                "mean": _means(list(found.values())),
                "difference": difference,
                "quality": _quality(difference),
            }
        )
    for row, speed in zip(rows, _speeds([row["difference"] for row in rows]), strict=True):
        row["speed"] = speed
        row["pays"] = None
        if speed and row["quality"]:
            faster = [at for at, of in speed.items() if of["verdict"] == "faster"]
            row["pays"] = faster if row["quality"] == "within" else []
    return rows


def _measured(of: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, float | None]]:
    return {seed: measures_of(result) for seed, result in of.items() if not result["failed"]}


def _means(found: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of each measure, over the seeds; None where one of them lacks it."""
    columns = {name: [of.get(name) for of in found] for name in _names(found)}
    return {
        name: None if None in values else mean(value for value in values if value is not None)
        for name, values in columns.items()
    }


def _names(found: Sequence[Mapping[str, float | None]]) -> list[str]:
    """Of all that was measured; runs that are not timed yet lack some."""
    return list(dict.fromkeys(name for of in found for name in of))


def _differences(
    found: Mapping[int, Mapping[str, float | None]], base: Mapping[int, Mapping[str, float | None]]
) -> dict[str, dict[str, Any]]:
    seeds = [seed for seed in found if seed in base]
    differences = {}
    for name in _names([found[seed] for seed in seeds]):
        pairs = [(found[seed].get(name), base[seed].get(name)) for seed in seeds]
        both = [(one, other) for one, other in pairs if one is not None and other is not None]
        if both:
            values, baseline = zip(*both, strict=True)
            relative = name.startswith(RELATIVE)
            differences[name] = asdict(paired_difference(values, baseline, relative=relative))
    return differences


def _quality(difference: Mapping[str, Mapping[str, Any]]) -> str | None:
    of = difference.get("perplexity")
    if of is None or of["low"] is None:
        return None
    if of["high"] <= TOLERATED:
        return "within"
    return "over" if of["low"] > TOLERATED else "not shown"


def _speeds(differences: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """{temperature: {p, verdict}} of each variant, all tested together."""
    tested = [
        (place, name, of)
        for place, difference in enumerate(differences)
        for name, of in difference.items()
        if name.startswith(_SPEED) and of["p"] is not None
    ]
    speeds: list[dict[str, dict[str, Any]]] = [{} for _ in differences]
    for (place, name, of), p in zip(tested, holm([of["p"] for _, _, of in tested]), strict=True):
        verdict = "not shown" if p >= _RISK else "faster" if of["mean"] > 0 else "slower"
        speeds[place][name.removeprefix(_SPEED)] = {"p": p, "verdict": verdict}
    return speeds

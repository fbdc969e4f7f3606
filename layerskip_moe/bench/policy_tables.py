"""A comparison of policies as tables, for a terminal and in Markdown.

    accepted         drafts the full model agreed with, of all that were verified
    tokens / round   new tokens for each verification
    experts / token  different experts that verification read in a MoE layer, by new token; plain decoding reads K
    exit             layers that drafted, mean over the rounds that did
    drafts           tokens drafted and verified, mean over all rounds
    int8             share of the rounds that drafted whose drafts are made from int8 copies
    way              from the best fixed pair's tokens/s, 0%, to 100%, each round's best pair; more by other drafts
    whole way        to 100% where each is drafted in the best way there is, also in stages and by lookups
    agrees           share of tokens at which an exit says what the last layer says
    told by margin   how often it is larger where they agree than where not: area under the ROC curve, 0.50 is chance
    by probability   likewise

Knows nothing of how it was found. Next: `policies.py`; `analysis/figures/policies.py`, for the same as a picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.markdown import code, figure, number, percent, table
from layerskip_moe.bench.contenders import PUBLISHED
from layerskip_moe.bench.policies import ORACLES
from layerskip_moe.bench.tables import aligned

_HEAD = (
    "policy",
    "tokens/s",
    "speed-up",
    "95%",
    "accepted",
    "tokens / round",
    "experts / token",
    "exit",
    "drafts",
    "int8",
    "way",
    "95%",
    "whole way",
    "95%",
)
_TOLD_HEAD = ("exit layer", "agrees", "told by margin", "by probability")
_CHECK_HEAD = ("decoded for real", "same rounds", "same text", "measured / modelled", "speed-up modelled", "measured")


def policies_text(result: Mapping[str, Any]) -> str:
    """The tables of every temperature, for a terminal."""
    parts = []
    for comparison in result["comparisons"]:
        parts.append(_title(comparison))
        parts += [aligned([head, *rows]) for head, rows in _tables(comparison)]
    return "\n\n".join(parts)


def policies_markdown(result: Mapping[str, Any]) -> str:
    """policies.md, of what policies.json holds."""
    lines = ["# Drafting policies on a trace", "", code(result["command"]), ""]
    for comparison in result["comparisons"]:
        lines += [f"## {_title(comparison)}", ""]
        for head, rows in _tables(comparison):
            lines += table(head, rows)
    lines += figure(result, "policies", "Speed-up by exit layer and draft length, each policy a point")
    words = [line.strip().split("  ", 1) for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    lines += table(("column", "meaning"), [(name, meaning.strip()) for name, meaning in words])
    return "\n".join(lines).rstrip() + "\n"


def _title(comparison: Mapping[str, Any]) -> str:
    return (
        f"{decoding_label(comparison)}: {comparison['prompts']} prompts, {number(comparison['tokens'])} new tokens, "
        "seconds by the cost model"
    )


def _tables(comparison: Mapping[str, Any]) -> Iterator[tuple[Sequence[str], list[Sequence[str]]]]:
    """(head, rows) of each table."""
    rows = comparison["rows"]
    yield _HEAD, [_cells(row) for row in rows]
    published = [name for name in PUBLISHED if any(row["name"] == name for row in rows)]
    compared = [row for row in rows if row["draftable"] and row["name"] != "plain"]
    if published:
        head = ("faster than (95%)", *published)
        yield head, [(row["name"], *(_faster(row["faster_than"].get(name)) for name in published)) for row in compared]
    yield _TOLD_HEAD, [_told(row) for row in comparison["told"]]
    if "check" in comparison:
        yield _CHECK_HEAD, [_checked(row) for row in comparison["check"]]


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    ways = [cell for name in ORACLES for cell in _way(row["share_of_way"][name])]
    return (
        row["name"] if row["setting"] is None else f"{row['name']} ({row['setting']})",
        number(row["tokens_per_second"], 1),
        f"{row['speed_up']['value']:.2f} x",
        f"{row['speed_up']['low']:.2f}-{row['speed_up']['high']:.2f}",
        percent(row["acceptance_rate"]),
        number(row["tokens_per_round"], 2),
        number(row["experts_per_token"], 2),
        number(row["mean_exit_layer"], 1),
        number(row["mean_draft_length"], 1),
        _whole_percent(row["int8_share"]),
        *ways,
    )


def _way(share: Mapping[str, Any]) -> tuple[str, str]:
    low, high = _whole_percent(share["low"]), _whole_percent(share["high"])
    return _whole_percent(share["value"]), "-" if share["low"] is None else f"{low} to {high}"


def _faster(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "-"
    return f"{difference['value']:+.1%} ({difference['low']:+.1%} to {difference['high']:+.1%})"


def _told(row: Mapping[str, Any]) -> Sequence[str]:
    areas = (number(row[name], 2) for name in ("by_margin", "by_probability"))
    return (str(row["exit_layer"]), percent(row["agreement"]), *areas)


def _checked(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        row["name"],
        f"{row['same_rounds']} of {row['prompts']}",
        f"{row['same_text']} of {row['prompts']}",
        f"{row['measured_over_modelled']:.2f} x",
        f"{row['modelled_speed_up']:.2f} x",
        f"{row['measured_speed_up']:.2f} x",
    )


def _whole_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"

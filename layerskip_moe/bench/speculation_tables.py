"""The result of `bench speculation` as markdown tables.

Knows nothing of how it was measured. Next: `speculation.py`, which did.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def speculation_text(result: Mapping[str, Any]) -> str:
    """Three tables: texts, drafts that are never right, and the batch."""
    return "\n\n".join(
        [
            _table(
                (
                    "text",
                    "at",
                    "plain, tokens/s",
                    "adaptive over plain (middle half)",
                    "accepted",
                    "tokens per verification",
                    "best fixed pair, over plain",
                    "adaptive over it (middle half)",
                    "distinct 4-grams",
                    "identical",
                ),
                [_text_cells(row) for row in result["rows"]],
            ),
            _table(
                ("no draft ever right, at", "tokens", "adaptive over plain (middle half)", "identical"),
                [
                    (_at(row), str(row["tokens"]), _ratio(row), f"{row['identical']} of {row['prompts']}")
                    for row in result["wrong"]
                ],
            ),
            _table(
                ("batch, at", "rows", "plain, tokens/s", "adaptive over plain (middle half)", "identical"),
                [
                    (
                        _at(row),
                        str(row["batch_size"]),
                        f"{row['plain_tokens_per_second']:.0f}",
                        _median(row["speed_up"]),
                        f"{row['identical']} of {row['outputs']}",
                    )
                    for row in result["batch"]
                ],
            ),
        ]
    )


def _text_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    best, accepted, distinct = row["best_fixed"], row["acceptance_rate"], row["distinct_4grams"]
    return (
        row["text"],
        _at(row),
        f"{row['plain_tokens_per_second']:.0f}",
        _ratio(row),
        "-" if accepted is None else f"{accepted:.0%}",
        f"{row['tokens_per_verification']:.2f}",
        f"({best['name']}): {_ratio(best)}",
        _median(row["over_best_fixed"]),
        "-" if distinct is None else f"{distinct:.0%}",
        f"{row['identical_in_grid']} of {row['outputs_in_grid']}",
    )


def _at(row: Mapping[str, Any]) -> str:
    return "greedy" if row["temperature"] == 0 else f"T {row['temperature']:g}"


def _ratio(row: Mapping[str, Any]) -> str:
    low, high = row["speed_up_quartiles"]
    return f"{row['speed_up']:.2f} ({low:.2f} to {high:.2f})"


def _median(ratios: Mapping[str, float]) -> str:
    return f"{ratios['median']:.2f} ({ratios['low']:.2f} to {ratios['high']:.2f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

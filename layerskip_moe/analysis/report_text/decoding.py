"""Self-speculative decoding: how fast, how exact, which drafts are accepted, and what the text reads like.

Next: `sweep.py`, for the settings; `strategies.py`, for the ways to decode that change the text.
"""

from collections.abc import Sequence

from layerskip_moe.analysis.findings import decoding_label
from layerskip_moe.analysis.report_text.markdown import (
    Report,
    counted,
    fenced,
    figure,
    number,
    percent,
    quartiles,
    table,
)

DRAFTING_HEADER = ("strategy", "exit layer", "draft length", "tokens/s", "speed-up", "middle half", "accepted")
_LOOPING = 0.5  # distinct 4-grams below which a text is said to repeat itself


def decoding_lines(report: Report) -> list[str]:
    """`decoding`: a table for each comparison, and the share of drafts accepted by their place in a round."""
    header = (*DRAFTING_HEADER, "tokens per verification", "distinct 4-grams", "identical", "prefill, ms")
    lines = []
    for comparison in report.get("decoding") or []:
        rows = comparison["strategies"]
        lines += [
            f"### {decoding_label(comparison).capitalize()}",
            "",
            how_measured(comparison),
            "",
            *table(header, [_row(row, comparison["prompts"]) for row in rows]),
            *differences(rows),
        ]
    return lines + _by_position(report)


def how_measured(comparison: Report) -> str:
    """What a comparison's figures are medians of, and what they leave out."""
    return (
        f"{counted(comparison['prompts'], 'held-out prompt')} x {counted(comparison['max_new_tokens'], 'token')}, "
        f"one at a time (batch 1), each prompt with a seed of its own, from {comparison['seed']} on; warmed up, "
        "interleaved, medians over prompts. Speed-up is the median of each prompt's own ratio to "
        f"`{comparison['strategies'][0]['name']}`, which is not the ratio of two medians of tokens/s. Tokens/s leaves "
        "out the prefill."
    )


def repeats_itself(row: Report) -> bool:
    """Whether a strategy's text has so few distinct 4-grams that it loops."""
    return row["distinct_4grams"] is not None and row["distinct_4grams"] < _LOOPING


def drafting_cells(row: Report) -> tuple[str, ...]:
    """A strategy's cells under `DRAFTING_HEADER`."""
    return (
        row["name"],
        number(row["exit_layer"]),
        number(row["draft_length"]),
        number(row["tokens_per_second"], 1),
        number(row["speed_up"], 2),
        quartiles(row),
        percent(row["acceptance_rate"]),
    )


def _row(row: Report, prompts: int) -> tuple[str, ...]:
    return (
        *drafting_cells(row),
        number(row["tokens_per_verification"], 2),
        percent(row["distinct_4grams"]),
        f"{row['identical']} of {prompts}",
        number(None if row["prefill_seconds"] is None else 1000 * row["prefill_seconds"], 1),
    )


def differences(rows: Sequence[Report]) -> list[str]:
    """Where outputs first differ from the baseline's, a line for each strategy that has such outputs."""
    lines = []
    for row in rows:
        # The report counts from 0, readers from 1.
        places = [f"{int(prompt) + 1} (token {place + 1})" for prompt, place in row["first_differences"].items()]
        if places:
            lines.append(f"- `{row['name']}` parts from `{rows[0]['name']}` on prompts {', '.join(places)}.")
    return [*lines, ""] if lines else []


def _by_position(report: Report) -> list[str]:
    found = report["findings"].get("acceptance_by_position")
    if not found:
        return []
    longest = max(len(row["accepted"]) for row in found)
    rows = []
    for row in found:
        shares = [*row["accepted"], *[None] * (longest - len(row["accepted"]))]
        rows.append((row["decoding"], row["name"], *map(percent, shares)))
    return [
        "### Which drafts of a round are accepted",
        "",
        "A draft counts only if all before it in its round were accepted, so these shares fall with the place even "
        "where every token is equally easy to guess. They do not say that later tokens are harder: the acceptance "
        f"given that the drafts before were accepted would, and the figure has both{_drawn(report)}.",
        "",
        *table(("decoding", "strategy", *(f"draft {place}" for place in range(1, longest + 1))), rows),
        *figure(report, "acceptance_by_position", "Acceptance by place in the round"),
    ]


def _drawn(report: Report) -> str:
    return ", from the sweep" if (report.get("sweep") or {}).get("by_position") else ""


def continuation_lines(report: Report) -> list[str]:
    """`continuations`, as text."""
    lines = []
    for place, sample in enumerate(report.get("continuations") or [], start=1):
        lines += [f"### Prompt {place}", "", *fenced(sample["prompt"]), "Plain decoding, greedy:", ""]
        lines += fenced(sample["plain"])
        if sample["self_speculative"] == sample["plain"]:
            lines += ["Self-speculative decoding: the same text.", ""]
        else:
            lines += ["Self-speculative decoding:", "", *fenced(sample["self_speculative"])]
    return lines

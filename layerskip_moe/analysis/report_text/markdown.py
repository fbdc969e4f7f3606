"""The few forms that a report's Markdown is made of, and how its numbers are written.

Every function that gives lines ends them with an empty one. None, which stands for what could not be
measured, is written "-". Knows nothing of what is told.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]  # a report, or a part of it, as report.json holds it


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; without rows, nothing."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return [f"| {' | '.join(map(_cell, header))} |", "|" + " --- |" * len(header), *lines, ""] if lines else []


def _cell(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|")


def settings(title: str, values: Report) -> list[str]:
    """A table of names and their values."""
    rows = [(f"`{name}`", "-" if value is None else str(value)) for name, value in values.items()]
    return table((title, "value"), rows)


def fenced(text: str) -> list[str]:
    """A code block whose fence is longer than any run of back-ticks within it."""
    fence = _back_ticks(text, 3)
    return [fence, text, fence, ""]


def literal(text: str) -> str:
    """A text within a line, quoted and escaped as Python writes it: its blanks, newlines and back-ticks show.

    The quotes keep the blanks and back-ticks at its ends from being taken as Markdown's own.
    """
    return code(repr(text))


def code(text: str) -> str:
    """A code span whose back-ticks are more than any run of them within it."""
    ticks = _back_ticks(text, 1)
    return f"{ticks}{text}{ticks}"


def _back_ticks(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def figure(report: Report, name: str, title: str) -> list[str]:
    """A picture, where the report has it."""
    path = report["figures"].get(name)
    return [f"![{title}]({path})", ""] if path else []


def number(value: float | None, digits: int = 0) -> str:
    """A number with commas between thousands and `digits` decimals."""
    return "-" if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """A setting, such as a threshold, with no more decimals than it has."""
    return "-" if value is None else f"{value:g}"


def counted(count: int, what: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{number(count)} {what}{'' if count == 1 else 's'}"


def percent(share: float | None) -> str:
    """A share, 0 to 1, in percent."""
    return "-" if share is None else f"{100 * share:.1f}%"


def listed(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def quartiles(row: Report) -> str:
    """The speed-ups between which the middle half of the prompts lies."""
    return " to ".join(number(quartile, 2) for quartile in row["speed_up_quartiles"])


def speed_verdict(row: Report) -> str:
    """How a strategy's speed-up compares with plain decoding, to the two decimals that are shown.

    Bold only where the middle half of the prompts lies on one side of 1.
    """
    times, ends = f"{row['speed_up']:.2f}", row["speed_up_quartiles"]
    mixed = None in ends or ends[0] < 1 < ends[1]
    bold, so = ("", ", so not alike on all") if mixed else ("**", "")
    half = f"middle half of the prompts: {quartiles(row)} times{so}"
    if times == "1.00":
        return f"{bold}neither faster nor slower{bold} than plain decoding (1.00 times its speed; {half})"
    if row["speed_up"] < 1:
        return f"{bold}slower{bold} than plain decoding: {times} times its speed ({half})"
    return f"{bold}{times} times as fast{bold} as plain decoding ({half})"


def balance_name(measure: str) -> str:
    """What a measure of balance is called, by its name in the report."""
    return {"max_violation": "MaxVio"}.get(measure, measure.replace("_", " "))

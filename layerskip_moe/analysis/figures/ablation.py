"""An ablation's variants beside each other: what they cost and buy, and the experts that their rows need.

A row is {variant, mean: {measure: value}, difference: {measure: {low, high}}} with the measures of
`ablation/summary.py`. Knows nothing of what the variants are. Next: `decoding.py`, for one model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerskip_moe.analysis.figures.drawing import (
    GREY,
    SERIES,
    drawable,
    labels_beside,
    legend_outside,
    new_panels,
    scale_for_ratios,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ablation_tradeoff(rows: Sequence[Mapping[str, Any]], *, tolerated: float) -> "Figure":
    """Final perplexity against tokens/s of the fastest pair of exit layer and draft length, a panel per temperature, a
    point per variant, the first (the base) apart; left of the dashed line, perplexity is less than `tolerated` above
    the base's; the dotted line is plain decoding of the base.

    Raises ValueError where no variant was timed.
    """
    timed = dict.fromkeys(name for row in rows for name in row["mean"] if name.startswith("tokens_per_second_"))
    points = {name: _points(rows, name) for name in timed}
    points = {name: found for name, found in points.items() if found}
    if not points:
        raise ValueError("There are no tokens/s to draw: no variant was timed.")
    base = drawable(rows[0]["mean"].get("perplexity"))
    height = max(2.6, 1.2 + 0.19 * len(rows))
    figure, panels = new_panels(len(points), width=9.5, height=len(points) * height, columns=1)
    handles: list[Any] = []
    for (measure, found), axes in zip(points.items(), panels, strict=True):
        at = measure.removeprefix("tokens_per_second_")
        axes.set_title("greedy" if at == "0" else f"temperature {at}", fontsize=10)
        plainly = drawable(rows[0]["mean"].get(f"plain_{measure}"))
        line = axes.axhline(plainly, color=GREY, linewidth=1, linestyle=":", label="plain decoding of the base")
        most, name = (1 + tolerated) * base, f"base's perplexity + {tolerated:.0%}"
        limit = axes.axvline(most, color=GREY, linewidth=1, linestyle="--", label=name)
        for perplexity, speed, name in found:
            colour, marker, _ = SERIES[0 if name == rows[0]["variant"] else 1]
            axes.plot(perplexity, speed, color=colour, marker=marker, linestyle="", zorder=3)
        scale_for_ratios(axes, "x", [*(point[0] for point in found), most], "perplexity")
        scale_for_ratios(axes, "y", [*(point[1] for point in found), plainly], "tokens/s")
        labels_beside(axes, found, gap=0.23 / height)
        handles = [line, limit]
    legend_outside(figure, handles, below=2)
    return figure


def ablation_unions(rows: Sequence[Mapping[str, Any]], independent: Mapping[int, float]) -> "Figure":
    """Experts that adjacent rows need over those of one row, a bar for each span and variant; the dashed lines are
    `independent`, what the base would need if each row chose at random. Rows without experts are left
    out; raises ValueError where all are."""
    bars = {
        row["variant"]: [drawable(row["mean"].get(f"union_{span}")) for span in independent]
        for row in rows
        if any(row["mean"].get(f"union_{span}") is not None for span in independent)
    }
    if not bars:
        raise ValueError("There are no unions to draw: no variant has experts.")
    figure, (axes,) = new_panels(1, width=9.5, height=1.9 + 0.17 * len(independent) * len(bars))
    width = 0.8 / len(independent)
    handles = []
    for place, (span, colour) in enumerate(zip(independent, shades(len(independent)), strict=True)):
        at = [row + width * (place - (len(independent) - 1) / 2) for row in range(len(bars))]
        handles.append(
            axes.barh(at, [values[place] for values in bars.values()], 0.9 * width, color=colour, label=f"{span} rows")
        )
        axes.axvline(independent[span], color=colour, linewidth=1.5, linestyle="--")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(
        title="Experts that adjacent rows need together\n(dashed: the base, if each row chose at random)",
        xlabel="experts / those of one row",
        ylabel="variant",
        xlim=(1, None),
    )
    legend_outside(figure, handles, below=len(handles))
    return figure


def _points(rows: Sequence[Mapping[str, Any]], measure: str) -> list[tuple[float, float, str]]:
    """(perplexity, measure, variant) of the rows that have both."""
    means = [(row["mean"].get("perplexity"), row["mean"].get(measure), row["variant"]) for row in rows]
    points = [(drawable(perplexity), drawable(value), name) for perplexity, value, name in means]
    return [point for point in points if not math.isnan(point[0] + point[1])]

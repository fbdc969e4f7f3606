"""A benchmark's result as a picture: a bar for each program, a panel for each precision.

Knows nothing of how it was measured. matplotlib is imported by the first figure. Next: `tables.py`, for all figures.
"""

from typing import TYPE_CHECKING, Any

from layerskip_moe.analysis.figures.drawing import GREY, PALE, SERIES, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def benchmark_figure(result: dict[str, Any]) -> "Figure":
    """Medians as bars with their quartiles, ours in colour; a line at what the memory allows (decoding), or at what is
    needed at least (memory)."""
    groups = result["groups"]
    figure, panels = new_panels(len(groups), width=3.6 * len(groups) + 1.5)
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        rows = list(reversed(group["rows"]))  # the first on top
        for place, row in enumerate(rows):
            value = row["value"]
            low, high = value["quartiles"]
            colour = SERIES[0][0] if row["name"].startswith("ours") else PALE
            spread = [[value["median"] - low], [high - value["median"]]]
            axes.barh(place, value["median"], color=colour, xerr=spread, ecolor=GREY)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_title(name, fontsize=10)
        line = group["floor"]["tokens_per_second"] if "floor" in group else group.get("needed", 0) / 1e6
        meaning = ""
        if line:
            axes.axvline(line, color=GREY, linestyle="--")
            meaning = " (dashed: all that reading allows)" if "floor" in group else " (dashed: needed)"
        axes.set_xlabel(result["unit"] + meaning)
    return figure

"""Drafting policies on a map: the speed-up of every fixed exit layer and draft length, and where each policy is on it.

A comparison is one temperature's of `PolicyComparison.as_report`. A policy's place is its mean, so that its own
speed-up, written beside its name, may be above that of the ground it stands on: it chose when to draft how much.
Knows nothing of how policies were compared. Next: `decoding.py`, for pairs that were timed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip_moe.analysis.figures.drawing import new_panels
from layerskip_moe.analysis.findings import decoding_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour and marker of each policy; all can be told apart on the map's blue, grey and yellow, with a white edge.
_STYLES = (
    ("black", "X"),
    ("#56b4e9", "s"),
    ("#00487f", "o"),
    ("#d55e00", "D"),
    ("#009e73", "^"),
    ("#cc79a7", "P"),
    ("#6b6b6b", "v"),
    ("#8c1d40", "<"),
    ("#e69f00", ">"),
    ("#7f4fc9", "p"),
)
# What no policy does: the tree, and the oracles, that of pairs and those that draft in every way.
_OTHERS = {
    "best tree": ("white", "v"),
    "oracle of pairs": ("#b8e0a8", "*"),
    "oracle of one": ("white", "*"),
    "oracle": ("#f0e442", "*"),
}


def policy_map(comparisons: Sequence[Mapping[str, Any]]) -> "Figure":
    """Speed-up over plain decoding by exit layer and draft length, filled and lined, a row of panels per temperature:
    drafts by the weights themselves, and beside them those made from int8 copies, where these were compared; a named
    point for each policy that drafted anything, where most of its rounds are.

    comparisons: {temperature, prompts, exit_layers, draft_lengths, speed_up [exit layers][draft lengths],
    int8_exit_layers, int8_draft_lengths, int8_speed_up, rows: [{name, mean_exit_layer, mean_draft_length, int8_share,
    speed_up: {value}, draftable}]}. Rows that are not draftable are the best tree and, as stars, the oracles. Raises
    ValueError without comparisons, and for fewer than two exit layers.
    """
    from matplotlib.ticker import MaxNLocator

    if not comparisons:
        raise ValueError("There is no comparison to draw: give at least one temperature's.")
    if min(len(comparison["exit_layers"]) for comparison in comparisons) < 2:
        raise ValueError("There is no map to draw: it takes two exit layers, and the model has one below its last.")
    kinds = ("", "int8_") if any(comparison["int8_exit_layers"] for comparison in comparisons) else ("",)
    grounds = [comparison[f"{kind}speed_up"] for comparison in comparisons for kind in kinds]
    values = np.concatenate([np.ravel(ground) for ground in grounds])
    levels = MaxNLocator(10).tick_values(values.min(), values.max())
    figure, panels = new_panels(
        len(comparisons) * len(kinds),
        width=9.5 if len(kinds) == 1 else 17.0,
        height=0.4 + 3.9 * len(comparisons),
        columns=len(kinds),
    )
    for index, axes in enumerate(panels):
        comparison, kind = comparisons[index // len(kinds)], kinds[index % len(kinds)]
        if not comparison[f"{kind}exit_layers"]:
            axes.set_axis_off()
            continue
        handles = _draw_ground(axes, comparison, kind, levels)
        shown = [row for row in comparison["rows"] if row["mean_exit_layer"] is not None]
        here = [(place, row) for place, row in enumerate(shown) if ((row["int8_share"] or 0) > 0.5) == bool(kind)]
        for place, row in here:
            handles += _draw_policy(axes, row, place, len(shown))
        lengths = [*comparison[f"{kind}draft_lengths"], *(row["mean_draft_length"] for _, row in here)]
        axes.set_ylim(0, max(lengths))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        of_kind = ", int8 drafts" if kind else ""
        axes.set_title(f"Speed-up over plain decoding, {decoding_label(comparison)}{of_kind}")
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelspacing=1.0)
    return figure


def _draw_ground(axes: "Axes", comparison: Mapping[str, Any], kind: str, levels: Any) -> list[Any]:
    """The speed-ups of the fixed pairs of one kind of drafts, and a line where there is none; its legend."""
    from matplotlib.lines import Line2D

    exits, drafts = comparison[f"{kind}exit_layers"], comparison[f"{kind}draft_lengths"]
    ground = np.array(comparison[f"{kind}speed_up"]).T
    axes.contourf(exits, drafts, ground, levels=levels, cmap="cividis")
    lines = axes.contour(exits, drafts, ground, levels=levels, colors="white", linewidths=0.6)
    axes.clabel(lines, fmt="%g", fontsize=8)
    axes.set_xticks(exits)
    axes.set_xlim(min(exits), max(exits))
    axes.set(xlabel="exit layer", ylabel="drafts per round")
    if not ground.min() < 1 < ground.max():
        return []
    # Without the edge of no drafts, which is plain decoding's speed all along.
    axes.contour(exits, drafts[1:], ground[1:], levels=[1.0], colors="black", linestyles="--", linewidths=1.5)
    return [Line2D([], [], color="black", linestyle="--", label="plain decoding, 1.00 x")]


def _draw_policy(axes: "Axes", row: Mapping[str, Any], place: int, count: int) -> list[Any]:
    """The point of one of so many rows."""
    colour, marker = _STYLES[place % len(_STYLES)] if row["draftable"] else _OTHERS[row["name"]]
    return axes.plot(
        row["mean_exit_layer"],
        row["mean_draft_length"],
        color=colour,
        marker=marker,
        markersize=17 - 10 * place / count if row["draftable"] else 14,  # the next does not hide it
        markeredgecolor="white" if row["draftable"] else "black",
        linestyle="",
        zorder=3,
        clip_on=False,
        label=f"{row['name']}, {row['speed_up']['value']:.2f} x",
    )

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
)
# What no policy does: the tree, the oracle that is held to one exit layer, and the other.
_OTHERS = {"best tree": ("white", "v"), "oracle of one": ("white", "*"), "oracle": ("#f0e442", "*")}


def policy_map(comparisons: Sequence[Mapping[str, Any]]) -> "Figure":
    """Speed-up over plain decoding by exit layer and draft length, filled and lined, a panel per temperature; a named
    point for each row that drafted anything.

    comparisons: {temperature, prompts, exit_layers, draft_lengths, speed_up [exit layers][draft lengths], rows: [{name,
    mean_exit_layer, mean_draft_length, speed_up: {value}, draftable}]}. Rows that are not draftable are the best tree
    and, as stars, the oracles. Raises ValueError without comparisons, and for fewer than two exit layers.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if not comparisons:
        raise ValueError("There is no comparison to draw: give at least one temperature's.")
    if min(len(comparison["exit_layers"]) for comparison in comparisons) < 2:
        raise ValueError("There is no map to draw: it takes two exit layers, and the model has one below its last.")
    values = np.concatenate([np.ravel(comparison["speed_up"]) for comparison in comparisons])
    levels = MaxNLocator(10).tick_values(values.min(), values.max())
    figure, panels = new_panels(len(comparisons), width=9.5, height=0.4 + 3.9 * len(comparisons), columns=1)
    for axes, comparison in zip(panels, comparisons, strict=True):
        exits, drafts = comparison["exit_layers"], comparison["draft_lengths"]
        ground = np.array(comparison["speed_up"]).T
        axes.contourf(exits, drafts, ground, levels=levels, cmap="cividis")
        lines = axes.contour(exits, drafts, ground, levels=levels, colors="white", linewidths=0.6)
        axes.clabel(lines, fmt="%g", fontsize=8)
        handles: list[Any] = []
        if ground.min() < 1 < ground.max():
            # Without the edge of no drafts, which is plain decoding's speed all along.
            axes.contour(exits, drafts[1:], ground[1:], levels=[1.0], colors="black", linestyles="--", linewidths=1.5)
            handles.append(Line2D([], [], color="black", linestyle="--", label="plain decoding, 1.00 x"))
        shown = [row for row in comparison["rows"] if row["mean_exit_layer"] is not None]
        for place, row in enumerate(shown):
            colour, marker = _STYLES[place % len(_STYLES)] if row["draftable"] else _OTHERS[row["name"]]
            handles += axes.plot(
                row["mean_exit_layer"],
                row["mean_draft_length"],
                color=colour,
                marker=marker,
                markersize=17 - 10 * place / len(shown) if row["draftable"] else 14,  # the next does not hide it
                markeredgecolor="white" if row["draftable"] else "black",
                linestyle="",
                zorder=3,
                clip_on=False,
                label=f"{row['name']}, {row['speed_up']['value']:.2f} x",
            )
        axes.set_xticks(exits)
        axes.set_xlim(min(exits), max(exits))
        axes.set_ylim(0, max([max(drafts), *(row["mean_draft_length"] for row in shown)]))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="exit layer", ylabel="drafts per round")
        axes.set_title(f"Speed-up over plain decoding, {decoding_label(comparison)}, {comparison['prompts']} prompts")
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelspacing=1.0)
    return figure

"""How fast strategies decode, how much of a draft is kept, and what their text is worth.

A comparison is an entry of a report's `decoding` or `strategies`: rows of strategies, the baseline first.
Knows nothing of how they were timed. Next: `exits.py`, the layers that draft.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip_moe.analysis.figures.drawing import (
    GREY,
    MARKERS,
    SERIES,
    colour_bar,
    drawable,
    drawables,
    edges,
    labels_beside,
    legend_outside,
    new_panels,
    scale_for_ratios,
    shades,
    whole_ticks,
)
from layerskip_moe.analysis.findings import decoding_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speed_up_contour(sweep: Mapping[str, Any]) -> "Figure":
    """Speed-up over plain decoding by exit layer and draft length, written at each point that was measured.

    sweep: a report's section: temperature, top_p, prompts, exit_layers, draft_lengths, speed_up [exit layers]
    [draft lengths] and, optional, chosen {exit_layer, draft_length}, which is marked. Filled contours between the
    points; a heat map where there are fewer than two of either. The dashed line is 1.0: as fast as plain decoding.
    Raises ValueError if nothing was measured.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    exits, drafts = sweep["exit_layers"], sweep["draft_lengths"]
    speed_up = np.array([drawables(row) for row in sweep["speed_up"]])  # [exit layers, draft lengths]
    if speed_up.size == 0 or np.isnan(speed_up).all():
        raise ValueError("There is no speed-up to draw: the sweep timed no pair of exit layer and draft length.")
    margin = 0.05 if np.ptp(speed_up[~np.isnan(speed_up)]) < 0.05 else 0.0  # equals need a range of colours too
    low, high = np.nanmin(speed_up) - margin, np.nanmax(speed_up) + margin
    grid = np.ma.masked_invalid(speed_up.T)

    figure, (axes,) = new_panels(1, width=8.5, height=4.6)
    handles: list[Any] = []
    if min(speed_up.shape) > 1:
        levels = MaxNLocator(9).tick_values(low, high)
        image: Any = axes.contourf(exits, drafts, grid, levels=levels, cmap="cividis")
        if np.nanmin(speed_up) < 1 < np.nanmax(speed_up):
            axes.contour(exits, drafts, grid, levels=[1.0], colors="black", linestyles="--")
            handles.append(Line2D([], [], color="black", linestyle="--", label="as fast as plain decoding"))
    else:
        image = axes.pcolormesh(edges(exits), edges(drafts), grid, cmap="cividis", vmin=low, vmax=high)

    chosen = sweep.get("chosen") or {}
    style: dict[str, Any] = {"ha": "center", "va": "center", "size": 9 if max(speed_up.shape) <= 8 else 7}
    for (row, column), value in np.ndenumerate(speed_up):
        if not math.isnan(value):
            picked = (exits[row], drafts[column]) == (chosen.get("exit_layer"), chosen.get("draft_length"))
            frame = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": "black" if picked else "none", "lw": 2}
            weight = "bold" if picked else "normal"
            axes.text(exits[row], drafts[column], f"{value:.2f}", weight=weight, bbox=frame, **style)
            if picked:
                handles.append(Patch(facecolor="white", edgecolor="black", linewidth=2, label="chosen"))
    axes.use_sticky_edges = False  # so that the outer values have room
    axes.margins(0.09)
    axes.set_xticks(exits)
    axes.set_yticks(drafts)
    measured = f"{decoding_label(sweep)}, {sweep['prompts']} prompt{'s' * (sweep['prompts'] != 1)}"
    axes.set(
        title=f"Speed-up over plain decoding\n({measured})", xlabel="exit layer", ylabel="tokens drafted per round"
    )
    colour_bar(figure, axes, image, "times as fast", format="%.2f")
    legend_outside(figure, handles, below=2)
    return figure


def acceptance_by_position(comparisons: Sequence[Mapping[str, Any]]) -> "Figure":
    """Acceptance of the i-th draft of a round, a line per exit layer (or draft model) and comparison.

    Left: of the rounds whose drafts before it were all accepted, accepted[i] / min(accepted[i-1], drafted[i]);
    a little low where some rounds drafted fewer tokens than others. Right: of all rounds that drafted so many,
    accepted[i] / drafted[i]. Rows of one exit layer, which differ in draft length, are counted together.
    comparisons: of a report; rows have drafted_by_position and accepted_by_position. A sweep is one too, with its
    `by_position` as `strategies`. Raises ValueError if no row drafted anything.
    """
    from matplotlib.lines import Line2D

    series: dict[tuple[str, str], np.ndarray[Any, Any]] = {}  # [3, positions]: drafted, reached, accepted
    for comparison in comparisons:
        for row in comparison["strategies"]:
            drafted = row.get("drafted_by_position") or []
            if drafted:
                drafter = row["name"] if row["exit_layer"] is None else f"exit layer {row['exit_layer']}"
                key = (drafter, decoding_label(comparison))
                accepted = row["accepted_by_position"]
                reached = np.minimum([drafted[0], *accepted[:-1]], drafted)
                counts = np.array([drafted, reached, accepted], dtype=np.float64)
                series[key] = _padded_sum(series[key], counts) if key in series else counts
    if not series:
        raise ValueError("There are no drafts to draw: no strategy drafted any tokens.")

    figure, (left, right) = new_panels(2, height=4.3)
    drafters = list(dict.fromkeys(drafter for drafter, _ in series))
    decodings = list(dict.fromkeys(decoding for _, decoding in series))
    looks: dict[str, dict[str, Any]] = {
        drafter: {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        for i, (drafter, colour) in enumerate(zip(drafters, shades(len(drafters)), strict=True))
    }
    styles = {decoding: SERIES[i % len(SERIES)][2] for i, decoding in enumerate(decodings)}
    longest = 0
    for (drafter, decoding), (all_drafts, reached, accepted) in series.items():
        places = range(1, 1 + len(accepted))
        for axes, rounds in ((left, reached), (right, all_drafts)):
            share = 100 * np.divide(accepted, rounds, out=np.full_like(accepted, np.nan), where=rounds > 0)
            axes.plot(places, share, linestyle=styles[decoding], label=f"{drafter}, {decoding}", **looks[drafter])
        longest = max(longest, len(accepted))
    handles = [Line2D([], [], label=drafter, **look) for drafter, look in looks.items()]
    if len(decodings) > 1:
        handles += [Line2D([], [], color=GREY, linestyle=styles[name], label=name) for name in decodings]
    else:
        figure.suptitle(f"Drafts by position, {decodings[0]}", fontsize=11)
    left.set(title="Accepted where all before it were", ylabel="% of those drafts")
    right.set(title="Accepted of all drafted", ylabel="% of drafts at this position")
    for axes in (left, right):
        axes.set(xlabel="position in the draft", ylim=(-3, 104))
        whole_ticks(axes, range(1, longest + 1))
    legend_outside(figure, handles, below=-(-len(handles) // -(-len(handles) // 7)))
    return figure


def quality(comparisons: Sequence[Mapping[str, Any]]) -> "Figure":
    """What each strategy's text is worth, by its speed: a panel per comparison, a named point per strategy.

    Perplexity is the full model's, of the text the strategy wrote; repetitive text has a low one too, so each
    name is followed by the share of distinct 4-grams. comparisons: of a report; rows have perplexity. A row
    without one is named below its panel. Raises ValueError if no row has one.
    """
    from matplotlib.lines import Line2D

    def is_scored(row: Mapping[str, Any]) -> bool:
        return not math.isnan(drawable(row.get("perplexity")) + drawable(row["tokens_per_second"]))

    shown = [c for c in comparisons if any(is_scored(row) for row in c["strategies"])]
    if not shown:
        raise ValueError("There is no quality to draw: no strategy has a perplexity of its text.")
    most = max(len(comparison["strategies"]) for comparison in shown)
    height = max(2.2, 0.22 * most)  # of a panel's axes
    figure, panels = new_panels(len(shown), height=0.6 + len(shown) * (height + 0.9), columns=1)
    exact: dict[str, Any] = {"color": SERIES[0][0], "marker": "o"}
    lossy: dict[str, Any] = {"color": SERIES[1][0], "marker": "^", "mfc": "white"}
    for axes, comparison in zip(panels, shown, strict=True):
        rows = [row for row in comparison["strategies"] if is_scored(row)]
        left_out = [row["name"] for row in comparison["strategies"] if not is_scored(row)]
        points = []
        for row in rows:
            same = row["identical"] == comparison["prompts"]
            axes.plot(row["perplexity"], row["tokens_per_second"], linestyle="", **(exact if same else lossy))
            distinct = row.get("distinct_4grams")
            told = "" if distinct is None else f" ({distinct:.0%} of 4-grams distinct)"
            name = f"{'●' if same else '△'} {row['name']}{told}"
            points.append((row["perplexity"], row["tokens_per_second"], name))
        axes.margins(y=0.08)
        unit = "perplexity of the text under the full model"
        scale_for_ratios(axes, "x", [row["perplexity"] for row in rows], unit)
        axes.set(title=f"Speed and quality of the text, {decoding_label(comparison)}", ylabel="tokens/s")
        if left_out:
            axes.set_xlabel(f"{axes.get_xlabel()}\n(not scored: {', '.join(left_out)})")
        labels_beside(axes, points, gap=0.2 / height)
    handles = [
        Line2D([], [], linestyle="", label="same text as the first, on every prompt", **exact),
        Line2D([], [], linestyle="", label="other text", **lossy),
    ]
    legend_outside(figure, handles, below=2)
    return figure


def _padded_sum(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The sum of two tables of counts, the narrower one continued by zeros."""
    total = np.zeros((len(one), max(one.shape[1], other.shape[1])))
    total[:, : one.shape[1]] += one
    total[:, : other.shape[1]] += other
    return total

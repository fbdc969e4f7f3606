"""Two trainings side by side: the same network with LayerSkip and without.

Knows nothing of how either was trained. Next: `main.py --compare`, which trains them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerskip_moe.analysis.figures.decoding import decoding_label, fastest_by_exit
from layerskip_moe.analysis.figures.drawing import (
    GREY,
    SERIES,
    drawables,
    legend_outside,
    new_panels,
    plain_log_scale,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison(comparison: Mapping[str, Any]) -> "Figure":
    """Perplexity by exit, MaxVio by layer and speed-up by exit layer of each run.

    comparison: a report's section. Of the draft lengths the fastest counts, and a curve per comparison in
    `decoding`. A panel that no run has values for is left out. Raises ValueError without runs.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    runs = comparison["runs"]
    if not runs:
        raise ValueError("There are no runs to compare.")
    has_experts = any(run.get("experts") for run in runs)
    decoded = any(fastest_by_exit(entry["strategies"]) for run in runs for entry in run.get("decoding") or [])
    count = 1 + has_experts + decoded
    figure, panels = new_panels(count, width=(5.5, 8.5, 10.5)[count - 1], height=4.2)
    looks = [SERIES[index % len(SERIES)] for index in range(len(runs))]
    by_exit, *others = panels

    perplexities = [drawables(run["perplexity"]) for run in runs]
    handles = []
    for run, values, (colour, marker, style) in zip(runs, perplexities, looks, strict=True):
        layers = range(1, len(values) + 1)
        handles += by_exit.plot(
            layers, values, color=colour, marker=marker, linestyle=style, markersize=4, label=run["name"]
        )
    by_exit.set(title="Held-out perplexity", xlabel="exit layer", ylabel="perplexity (log scale)")
    plain_log_scale(by_exit, "y", [value for values in perplexities for value in values])
    whole_ticks(by_exit, range(1, max(map(len, perplexities)) + 1), most=11)

    if has_experts:
        axes = others.pop(0)
        for run, (colour, marker, style) in zip(runs, looks, strict=True):
            experts = {int(layer): metrics["max_violation"] for layer, metrics in (run.get("experts") or {}).items()}
            axes.plot(
                list(experts), drawables(experts.values()), color=colour, marker=marker, linestyle=style, markersize=4
            )
        axes.set(title="Uneven expert load", xlabel="layer (from 0)", ylabel="MaxVio (0: even)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if decoded:
        (axes,) = others
        exits: set[int] = set()
        handles.append(axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":", label="plain decoding, same model"))
        for run, (colour, marker, style) in zip(runs, looks, strict=True):
            for index, entry in enumerate(run.get("decoding") or []):
                rows = fastest_by_exit(entry["strategies"])
                at, speed_ups = [row["exit_layer"] for row in rows], [row["speed_up"] for row in rows]
                exits |= set(at)
                # The first way of decoding is filled, the others are hollow and fainter.
                fill, alpha = ("white", 0.6) if index else (colour, 1.0)
                axes.plot(at, speed_ups, color=colour, marker=marker, linestyle=style, mfc=fill, alpha=alpha)
        ways = list(dict.fromkeys(decoding_label(entry) for run in runs for entry in run.get("decoding") or []))
        for index, way in enumerate(ways if len(ways) > 1 else []):
            fill = "white" if index else GREY
            handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", mfc=fill, label=way))
        axes.set(title="Speed-up of decoding", xlabel="exit layer", ylabel="times as fast as plain")
        whole_ticks(axes, sorted(exits), most=11)
    if comparison.get("steps") is not None:
        figure.suptitle(f"The same network, trained for {comparison['steps']} steps, one seed each", fontsize=11)
    legend_outside(figure, handles, below=len(handles))
    return figure

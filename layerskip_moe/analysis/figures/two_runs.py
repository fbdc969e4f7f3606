"""Two trainings side by side: the same network with LayerSkip and without.

Knows nothing of how either was trained. Next: `main.py --compare`, which trains them.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerskip_moe.analysis.figures.drawing import (
    GREY,
    SERIES,
    drawable,
    drawables,
    legend_outside,
    new_panels,
    scale_for_ratios,
    whole_ticks,
)
from layerskip_moe.analysis.findings import decoding_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison(comparison: Mapping[str, Any]) -> "Figure":
    """Perplexity by exit, MaxVio by layer and speed-up of decoding of each run.

    comparison: a report's section. A bar per run and comparison in `decoding` is its fastest setting, which is
    written on it; whiskers reach over the middle half of the prompts. A panel that no run has values for is
    left out. Raises ValueError without runs.
    """
    from matplotlib.ticker import MaxNLocator

    runs = comparison["runs"]
    if not runs:
        raise ValueError("There are no runs to compare.")
    has_experts = any(run.get("experts") for run in runs)
    fastest = [{decoding_label(entry): _fastest(entry) for entry in run.get("decoding") or []} for run in runs]
    decoded = any(row for by_decoding in fastest for row in by_decoding.values())
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
    by_exit.set(title="Held-out perplexity", xlabel="exit layer")
    scale_for_ratios(by_exit, "y", [value for values in perplexities for value in values], "perplexity")
    whole_ticks(by_exit, range(1, max(map(len, perplexities)) + 1), most=11)

    if has_experts:
        axes = others.pop(0)
        for run, (colour, marker, style) in zip(runs, looks, strict=True):
            experts = {int(layer): metrics["max_violation"] for layer, metrics in (run.get("experts") or {}).items()}
            axes.plot(
                list(experts), drawables(experts.values()), color=colour, marker=marker, linestyle=style, markersize=4
            )
        axes.set(title="MaxVio (0: even)", xlabel="layer (from 0)", ylabel="largest load / mean load - 1")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if decoded:
        (axes,) = others
        decodings = list(dict.fromkeys(name for by_decoding in fastest for name in by_decoding))
        width = 0.8 / len(runs)
        for index, (by_decoding, (colour, *_)) in enumerate(zip(fastest, looks, strict=True)):
            for name, row in by_decoding.items():
                if row:
                    at, speed_up = decodings.index(name) + width * (index - (len(runs) - 1) / 2), row["speed_up"]
                    axes.bar(at, speed_up, width=0.9 * width, color=colour)
                    axes.vlines(at, *row["speed_up_quartiles"], color="black", linewidth=1.5)
                    setting = f"exit {row['exit_layer']}\ndraft {row['draft_length']}"
                    frame = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"}  # a low bar is shorter than it
                    axes.text(at, 0.06, setting, rotation=90, ha="center", va="bottom", size=8.5, bbox=frame)
        handles.append(axes.axhline(1.0, color=GREY, linewidth=1, linestyle=":", label="plain decoding, same model"))
        axes.set(title="Speed-up of decoding", xlabel="decoding", ylabel="times as fast as plain")
        axes.set_xticks(range(len(decodings)), [name.replace(", ", "\n") for name in decodings])
        axes.set_xlim(-0.6, len(decodings) - 0.4)
    if comparison.get("steps") is not None:
        figure.suptitle(f"The same network, trained for {comparison['steps']} steps, one seed each", fontsize=11)
    legend_outside(figure, handles, below=len(handles))
    return figure


def _fastest(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest row that drafts, of a comparison; None if there is none."""
    rows = [row for row in entry["strategies"] if row["exit_layer"] is not None]
    timed = [row for row in rows if not math.isnan(drawable(row["speed_up"]))]
    return max(timed, key=lambda row: row["speed_up"], default=None)

"""How a run went: its losses, and where the time of a step goes.

Knows nothing of who wrote the records. Next: `recipe.py`, what the run was told to do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip_moe.analysis.figures.drawing import (
    GREY,
    PALE,
    SERIES,
    drawable,
    legend_outside,
    new_panels,
    shades,
    spread,
    step_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_curves(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]] = ()) -> "Figure":
    """Training loss of the whole model, and held-out loss of up to three exit layers, by step.

    train, validation: records of metrics.jsonl. The training curve is the last exit's cross entropy, without
    the other terms of the total; the held-out ones are ln(perplexity). Raises ValueError without train records.
    """
    points = [(r["step"], max((int(n), loss) for n, loss in r["exit_losses"].items())) for r in train]
    if not points:
        raise ValueError("There are no training records to draw; read them with read_metrics.")
    n_layers = max(layer for _, (layer, _) in points)
    steps = [step for step, (layer, _) in points if layer == n_layers]
    losses = [loss for _, (layer, loss) in points if layer == n_layers]

    figure, (axes,) = new_panels(1)
    span = 2 * (len(losses) // 80) + 1
    if span > 1:
        axes.plot(steps, losses, color=PALE, linewidth=0.8)
    name = "training, whole model" + (f"\n(mean of {span} records)" if span > 1 else "")
    lone = "o" if len(steps) == 1 else ""
    handles = axes.plot(steps, _running_mean(losses, span), color=GREY, marker=lone, linewidth=1.6, label=name)
    if validation:
        depths = len(validation[0]["perplexity"])
        shown = [1 + index for index in reversed(spread(depths, 3))]
        for layer, colour, (_, marker, style) in zip(shown, shades(len(shown)), SERIES, strict=False):
            curve = [math.log(drawable(r["perplexity"][layer - 1])) for r in validation]
            name = f"held out, exit layer {layer}" + ("\n(whole model)" if layer == depths else "")
            places = [r["step"] for r in validation]
            handles += axes.plot(places, curve, color=colour, marker=marker, linestyle=style, markersize=5, label=name)
    axes.set(title="Loss during training", ylabel="cross entropy (nats per token)")
    step_ticks(axes)
    # From the highest curve to the lowest, as they end; a curve without an end comes last.
    legend_outside(figure, sorted(handles, key=lambda line: -np.nan_to_num(line.get_ydata()[-1])))
    return figure


def step_parts(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """Seconds per part of a training step, stacked, over the run; the legend has each part's share of it.

    records: of metrics.jsonl. A record's `seconds` {part: seconds} are means over the steps since the last
    record, and drawn over those; where a record has none there is a gap. Raises ValueError if none has any.
    """
    from matplotlib.colors import to_rgba

    train = [record for record in records if record["split"] == "train"]
    parts = list(dict.fromkeys(part for record in train for part in record.get("seconds") or {}))
    if not parts:
        raise ValueError("There are no seconds per part of a step in these records; train again to have them recorded.")
    borders = [0, *(record["step"] + 1 for record in train)]
    timed = [record.get("seconds") or {} for record in train]
    # [parts, records], nan where a record has no seconds at all
    seconds = np.array([[times.get(part, 0.0) if times else math.nan for times in timed] for part in parts])
    totals = np.nansum(seconds * np.diff(borders), axis=1)

    figure, (axes,) = new_panels(1)
    top = np.cumsum(seconds, axis=0)
    hatches = ("", "///", "", "...", "")
    handles = []
    for i, (part, colour) in enumerate(zip(parts, shades(len(parts)), strict=True)):
        patch = axes.stairs(
            top[i],
            borders,
            baseline=top[i] - seconds[i],
            fill=True,
            facecolor=colour,
            edgecolor=to_rgba("white", 0.5),
            linewidth=0,
            hatch=hatches[i % len(hatches)],
            label=f"{part} ({totals[i] / max(totals.sum(), 1e-12):.0%})",
        )
        handles.append(patch)
    axes.set(title="Time per part of a training step", ylabel="seconds per step")
    axes.set_ylim(0, 1.05 * max(np.nanmax(top), 1e-9))
    axes.set_xlim(0, borders[-1])
    step_ticks(axes)
    legend_outside(figure, handles[::-1])
    return figure


def _running_mean(values: Sequence[float], span: int) -> list[float]:
    """Mean over a window of `span` values around each, smaller at the ends."""
    half = span // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]

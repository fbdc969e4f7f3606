"""Who does the work: the load of each expert, how even it is and was, and what a choice depends on.

E experts; layers by index from 0, as everywhere experts are named. Knows nothing of routers.
Next: `training/balance.py`, which defines the metrics of balance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip_moe.analysis.figures.drawing import (
    MARKERS,
    SERIES,
    drawables,
    heat_map,
    legend_outside,
    new_panels,
    shades,
    spread,
    step_ticks,
    thinned,
)
from layerskip_moe.training.balance import balance_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def expert_heat_map(load: Mapping[Any, Sequence[int]]) -> "Figure":
    """Share of each MoE layer's load per expert; the middle colour is the even share 1 / E, dark less, light more.

    load: layer index -> choices each of the E experts got. Raises ValueError for a model without experts.
    """
    from matplotlib.colors import TwoSlopeNorm

    if not load:
        raise ValueError("There is no load to draw: the model has no layer with experts.")
    counts = np.array([load[layer] for layer in load], dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n_layers, n_experts = percent.shape
    even = 100 / n_experts
    most = max(2 * even, float(percent.max()))
    norm = TwoSlopeNorm(even, vmin=0, vmax=most)
    figure, (axes,) = new_panels(1, width=min(9.5, 3.5 + 0.6 * n_experts), height=min(7, 1.8 + 0.4 * n_layers))
    columns = [str(expert) for expert in range(n_experts)]
    bar = heat_map(figure, axes, percent, rows=list(map(str, load)), columns=columns, bar="", cmap="cividis", norm=norm)
    bar.set_ticks([0, even, most], labels=["0%", f"{even:.3g}% (even)", f"{most:.3g}%"])
    axes.set(title="Load per expert (% of its layer's choices)", xlabel="expert", ylabel="layer (from 0)")
    return figure


def balance_over_training(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """How even each MoE layer's load was over the run: MaxVio, normalised entropy, dead experts.

    records: of metrics.jsonl; those with a `load` {layer: [E counts]} count, as `balance_metrics` defines it.
    Colours run from the first MoE layer, dark, to the last; the legend names up to eight of them.
    Raises ValueError if no record has a load.
    """
    loaded = [record for record in records if record.get("load")]
    if not loaded:
        raise ValueError("There is no load in these records: the model has no layer with experts.")
    layers = sorted({int(layer) for record in loaded for layer in record["load"]})
    figure, panels = new_panels(3, width=10.5, height=3.7)
    steps = [record["step"] for record in loaded]
    handles = []
    for index, (layer, colour) in enumerate(zip(layers, shades(len(layers)), strict=True)):
        metrics = [_metrics(record["load"].get(str(layer), record["load"].get(layer))) for record in loaded]
        marker = MARKERS[index % len(MARKERS)] if len(layers) <= 6 or len(loaded) == 1 else ""
        for axes, name, factor in zip(
            panels, ("max_violation", "normalized_entropy", "dead_experts"), (1, 1, 100), strict=True
        ):
            values = drawables((metric.get(name) for metric in metrics), factor)
            (line,) = axes.plot(
                steps, values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=f"layer {layer}"
            )
        handles.append(line)
    titles = ("MaxVio (0: even)", "Normalised entropy (1: even)", "Dead experts")
    units = ("largest load / mean load - 1", "entropy of the load / ln E", "% of the layer's experts")
    for axes, title, unit in zip(panels, titles, units, strict=True):
        axes.set(title=title, ylabel=unit)
        step_ticks(axes, most=5)
    panels[0].set_ylim(bottom=0)
    panels[2].set_ylim(-0.5, max(10.0, panels[2].get_ylim()[1]))
    legend_outside(figure, [handles[index] for index in spread(len(handles), 8)])
    return figure


def expert_tokens(expert_choice: Mapping[str, Any]) -> "Figure":
    """How much each layer's choice of experts depends on the token alone, beside what chance would give.

    expert_choice: a report's section: layers {layer: {token_dependence, chance}}, shares of choices predicted.
    Raises ValueError if it has no layer.
    """
    layers = expert_choice["layers"]
    if not layers:
        raise ValueError("There is no choice of experts to draw: the model has no layer with experts.")
    figure, (axes,) = new_panels(1)
    places = np.arange(len(layers))
    looks = (
        ("token_dependence", "by the token alone", SERIES[0][0], None),
        ("chance", "by the layer's busiest\nexperts (chance)", "#b9d9ee", "///"),
    )
    handles = []
    for side, (field, name, colour, hatch) in enumerate(looks):
        values = drawables((layer[field] for layer in layers.values()), 100)
        at = places + 0.4 * (side - 0.5)
        handles.append(axes.bar(at, values, width=0.4, color=colour, hatch=hatch, edgecolor="white", label=name))
        if len(layers) <= 10:
            for x, value in zip(at, values, strict=True):
                if not math.isnan(value):
                    axes.text(x, value + 1, f"{value:.0f}", ha="center", fontsize=9)
    shown = thinned(len(layers), 16)
    axes.set_xticks(places[shown], list(map(str, layers))[shown])
    axes.set(title="Expert choices predicted", xlabel="layer (from 0)", ylabel="% of choices", ylim=(0, 108))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    legend_outside(figure, handles)
    return figure


def _metrics(load: Sequence[int] | None) -> dict[str, float]:
    return {} if load is None else balance_metrics(torch.tensor(load))

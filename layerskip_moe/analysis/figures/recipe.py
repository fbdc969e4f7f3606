"""What LayerSkip's recipe asked of each step: how often layers were dropped, which exits were supervised.

S steps drawn, L layers. Knows nothing of how rates and curricula are made: `training/layer_dropout.py` and
`training/exit_loss.py` are. Next: `training.py`, how the run went.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip_moe.analysis.figures.drawing import (
    AMOUNT,
    MARKERS,
    colour_bar,
    edges,
    legend_outside,
    new_panels,
    shades,
    spread,
    step_ticks,
    thinned,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEVER_WHITE = "viridis_r"  # so that a small weight is not taken for none


def layer_dropout_schedule(rates: Sequence[Sequence[float]], steps: Sequence[int]) -> "Figure":
    """Layer dropout over depth and time: all steps as a map, and up to four of them as curves over depth.

    rates [S][L]: probabilities, as from `layer_dropout_rates`; steps [S]: the step of each row, increasing.
    Raises ValueError for no steps, or rates that are not one row per step.
    """
    percent = 100 * _by_step(rates, steps, "layer dropout rates")
    n_layers = percent.shape[1]
    figure, (left, right) = new_panels(2)
    highest = percent.max() or 1.0
    mesh = _map(left, percent, steps, first_layer=0, highest=highest, cmap=AMOUNT)
    colour_bar(figure, left, mesh, "% of samples that skip the layer")
    left.set(title="Layer dropout over depth and time", ylabel="layer (from 0)")

    shown = spread(len(steps), 4)
    handles = []
    for row, colour, marker in zip(shown, shades(len(shown)), MARKERS, strict=False):
        name = f"step {steps[row]}"
        handles += right.plot(range(n_layers), percent[row], color=colour, marker=marker, markersize=4, label=name)
    right.set(title="The same by layer", xlabel="layer (from 0)", ylabel="% of samples that skip it")
    right.set_ylim(-0.04 * highest, 1.08 * highest)
    whole_ticks(right, range(n_layers), most=11)
    legend_outside(figure, handles)
    return figure


def exit_curriculum(
    active: Sequence[Sequence[bool]],
    weights: Sequence[Sequence[float]] | None = None,
    steps: Sequence[int] | None = None,
) -> "Figure":
    """Which exit layers are supervised at which step; with weights, also how much each counts in the loss.

    An exit of weight 0 is not supervised.

    active [S][L]: as from `active_exits`. weights [S][L]: as from `exit_weights`, each row's sum 1; None: only
    on and off are drawn. steps [S]: the step of each row, increasing; None: 0 .. S - 1.
    Raises ValueError for no steps, or for active or weights that are not one row per step.
    """
    from matplotlib.patches import Patch

    steps = range(len(active)) if steps is None else steps
    on = _by_step(active, steps, "supervised exits")
    figure, (axes,) = new_panels(1)
    axes.set(title="Exits supervised at each step", ylabel="exit layer")
    if weights is None:
        mesh = _map(axes, np.where(on > 0, 1.0, np.nan), steps, first_layer=1, highest=1.0, cmap=_NEVER_WHITE)
        legend_outside(
            figure, [Patch(color=mesh.to_rgba(1.0), label="supervised"), Patch(fc="white", ec="black", label="not")]
        )
    else:
        percent = 100 * _by_step(weights, steps, "exit weights")
        shown = np.where((on > 0) & (percent > 0), percent, np.nan)
        mesh = _map(axes, shown, steps, first_layer=1, highest=np.nanmax(shown), cmap=_NEVER_WHITE)
        colour_bar(figure, axes, mesh, "% of the exit loss (white: not supervised)")
    return figure


def _by_step(rows: Sequence[Sequence[float]], steps: Sequence[int], what: str) -> "np.ndarray[Any, Any]":
    """rows as float [S, L]."""
    if len(rows) == 0 or len(rows) != len(steps) or len({len(row) for row in rows}) != 1 or len(rows[0]) == 0:
        raise ValueError(f"There must be one row of {what} for each step, got {len(rows)} for {len(steps)} steps.")
    return np.array([[float(value) for value in row] for row in rows])


def _map(
    axes: "Axes", values: "np.ndarray[Any, Any]", steps: Sequence[int], *, first_layer: int, highest: float, cmap: str
) -> Any:
    """Cells over steps (x) and layers (y); nan is white."""
    layers = range(first_layer, first_layer + values.shape[1])
    mesh = axes.pcolormesh(edges(steps), edges(layers), values.T, cmap=cmap, vmin=0, vmax=highest)
    axes.set_yticks(layers[thinned(len(layers), 16)])
    step_ticks(axes)
    return mesh

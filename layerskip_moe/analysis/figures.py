"""The report's pictures: small functions from plain data to a matplotlib Figure.

Figures are built without pyplot, so the user's backend and open figures are left alone; in a notebook a
Figure shows itself as the last line of a cell. Colours are Okabe and Ito's and viridis, which the
colour-blind can tell apart.
Knows nothing of where the data came from. Next: `report.py`, which calls these.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip_moe.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b"
_SERIES = ((_BLUE, "o"), (_ORANGE, "s"), (_GREEN, "^"), (_PURPLE, "D"))


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as the path's suffix says (.png, .svg, .pdf); never half a file."""
    path = Path(path)
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix.removeprefix("."), dpi=150)


def loss_curves(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]] = ()) -> "Figure":
    """Training loss of the whole model, and held-out loss of up to five exit layers, by step.

    train, validation: records of metrics.jsonl. The training curve is the last exit's cross entropy, without
    the other terms of the total; the held-out ones are ln(perplexity). Raises ValueError without train records.
    """
    points = [(r["step"], max((int(n), loss) for n, loss in r["exit_losses"].items())) for r in train]
    if not points:
        raise ValueError("There are no training records to draw; read them with read_metrics.")
    n_layers = max(layer for _, (layer, _) in points)
    steps = [step for step, (layer, _) in points if layer == n_layers]
    losses = [loss for _, (layer, loss) in points if layer == n_layers]

    figure, (axes,) = _panels(1, width=7.5)
    span = 2 * (len(losses) // 80) + 1
    if span > 1:
        axes.plot(steps, losses, color="#cfcfcf", linewidth=0.8)
    label = "training, whole model" + (f" (mean of {span} records)" if span > 1 else "")
    axes.plot(steps, _running_mean(losses, span), color=_GREY, linewidth=1.6, label=label)
    if validation:
        depths = len(validation[0]["perplexity"])
        shown = sorted({1 + round(i * (depths - 1) / 4) for i in range(5)}, reverse=True)
        for layer, colour in zip(shown, _shades(len(shown)), strict=True):
            curve = [math.log(_drawable(r["perplexity"][layer - 1])) for r in validation]
            label = f"held out, exit layer {layer}" + (" (whole model)" if layer == depths else "")
            axes.plot([r["step"] for r in validation], curve, color=colour, marker="o", markersize=3.5, label=label)
    axes.set(title="Loss during training", xlabel="step", ylabel="cross entropy (nats per token)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def perplexity_by_exit(perplexity: Sequence[float | None], agreement: Sequence[float]) -> "Figure":
    """Perplexity, and agreement with the last layer, of exit layers 1..L on held-out text."""
    layers = range(1, len(perplexity) + 1)
    figure, (left, right) = _panels(2)
    finite = [_drawable(value) for value in perplexity]
    percent = [100 * share for share in agreement]
    left.plot(layers, finite, color=_BLUE, marker="o")
    right.plot(layers, percent, color=_BLUE, marker="o")
    left.set(title="Held-out perplexity", xlabel="exit layer", ylabel="perplexity (log scale)", yscale="log")
    right.set(title="Same next token as the last layer", xlabel="exit layer", ylabel="% of positions")
    _plain_log_ticks(left, finite)
    right.set_ylim(0, 104)
    every = -(-len(layers) // 8)
    for axes, values, form, height in ((left, finite, "{:.3g}", 5), (right, percent, "{:.0f}%", -13)):
        for layer, value in zip(layers, values, strict=True):
            if (len(layers) - layer) % every == 0 and not math.isnan(value):
                _label(axes, layer, value, form.format(value), _GREY, offset=(4, height))
        _whole_ticks(axes, layers)
    return figure


def expert_heat_map(load: Mapping[Any, Sequence[int]]) -> "Figure":
    """Share of each MoE layer's load per expert; white is the ideal 1 / E, blue less, red more.

    load: layer index -> choices each of the E experts got. Raises ValueError for a model without experts.
    """
    from matplotlib.colors import TwoSlopeNorm

    if not load:
        raise ValueError("There is no load to draw: the model has no layer with experts.")
    counts = np.array([load[layer] for layer in load], dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n_layers, n_experts = percent.shape
    ideal = 100 / n_experts

    figure, (axes,) = _panels(1, width=min(12, 3 + 0.6 * n_experts), height=min(10, 1.8 + 0.4 * n_layers))
    norm = TwoSlopeNorm(ideal, vmin=0, vmax=max(2 * ideal, percent.max()))
    image = axes.imshow(percent, cmap="RdBu_r", norm=norm, aspect="auto")
    if n_experts <= 16 and n_layers <= 24:
        for (row, column), value in np.ndenumerate(percent):
            strong = abs(norm(value) - 0.5) > 0.3
            colour = "white" if strong else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(n_experts))
    axes.set_yticks(range(n_layers), [str(layer) for layer in load])
    axes.set(title="Load per expert (% of its layer's choices)", xlabel="expert", ylabel="layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, ticks=[0, ideal, norm.vmax])
    bar.ax.set_yticklabels(["0%", f"{ideal:.3g}% (even)", f"{norm.vmax:.3g}%"])
    bar.outline.set_visible(False)
    return figure


def speed_up_by_exit(comparisons: Sequence[Mapping[str, Any]]) -> "Figure":
    """Speed-up over plain decoding, and acceptance, of the fastest draft length at each exit layer.

    comparisons: `decoding` of a report; each is one series. Whiskers reach over the middle half of the
    prompts, the number above is the draft length, and faint marks are the draft lengths that were slower.
    """
    figure, (left, right) = _panels(2, height=4.3)
    handles = [left.axhline(1.0, color=_GREY, linewidth=1, linestyle="--", label="plain decoding, same model")]
    exits: set[int] = set()
    for index, comparison in enumerate(comparisons):
        colour, marker = _SERIES[index % len(_SERIES)]
        rows = [row for row in comparison["strategies"] if row["exit_layer"] is not None]
        best = {row["exit_layer"]: row for row in sorted(rows, key=lambda row: row["speed_up"])}
        fastest = [best[layer] for layer in sorted(best)]
        slower = [row for row in rows if row not in fastest]
        exits |= set(best)
        # Series stand a little apart, so that whiskers at one exit layer do not cover each other.
        shift = 0.12 * (index - (len(comparisons) - 1) / 2)
        for axes, field, factor in ((right, "acceptance_rate", 100), (left, "speed_up", 1)):
            x, y = _points(fastest, field, shift, factor)
            (line,) = axes.plot(x, y, color=colour, marker=marker, label=decoding_label(comparison))
            x, y = _points(slower, field, shift, factor)
            axes.plot(x, y, color=colour, marker=marker, linestyle="", markersize=4, alpha=0.3)
        handles.append(line)
        for row in fastest:
            low, high = row["speed_up_quartiles"]
            place = row["exit_layer"] + shift
            left.vlines(place, low, high, color=colour, alpha=0.5, linewidth=2)
            _label(left, place, high, str(row["draft_length"]), colour, offset=(0, 3), align="center")
    left.set(title="Speed-up over plain decoding", ylabel="times as fast")
    left.set_xlabel("exit layer (numbers: tokens drafted per round)")
    right.set(title="Drafted tokens accepted", xlabel="exit layer", ylabel="% of drafted tokens", ylim=(0, 104))
    for axes in (left, right):
        _whole_ticks(axes, sorted(exits))
    left.margins(y=0.12)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _points(
    rows: Sequence[Mapping[str, Any]], field: str, shift: float, factor: float
) -> tuple[list[float], list[float]]:
    return [row["exit_layer"] + shift for row in rows], [factor * _drawable(row[field]) for row in rows]


def decoding_label(comparison: Mapping[str, Any]) -> str:
    """How a comparison's tokens were chosen: "greedy", or its temperature and top-p."""
    if comparison["temperature"] == 0:
        return "greedy"
    top_p = "" if comparison.get("top_p") is None else f", top-p {comparison['top_p']:g}"
    return f"temperature {comparison['temperature']:g}{top_p}"


def _panels(count: int, width: float = 9.5, height: float = 3.9) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = [figure.add_subplot(1, count, 1 + index) for index in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _whole_ticks(axes: "Axes", layers: Sequence[int]) -> None:
    if layers:
        axes.set_xticks(layers[:: -(-len(layers) // 16)])
        axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)


def _plain_log_ticks(axes: "Axes", values: Sequence[float]) -> None:
    """Ticks at 1, 2, 5 x 10^n, written out, also where the data spans less than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    finite = [value for value in values if not math.isnan(value)]
    if finite:
        axes.set_ylim(min(finite) / 1.25, max(finite) * 1.35)


def _label(
    axes: "Axes", x: float, y: float, text: str, colour: str, *, offset: tuple[int, int], align: str = "left"
) -> None:
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=align, fontsize=8.5, color=colour)


def _drawable(value: float | None) -> float:
    """nan, which leaves a gap, for what a report could not measure or a diverged model made infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def _running_mean(values: Sequence[float], span: int) -> list[float]:
    """Mean over a window of `span` values around each, smaller at the ends."""
    half = span // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.0, 0.85, count)]

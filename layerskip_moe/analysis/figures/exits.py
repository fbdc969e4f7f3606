"""What a model's early exits know: quality and confidence by layer, and where tokens leave.

L layers, exit layer n = 1..L: the first n layers ran. Knows nothing of how exits were measured.
Next: `decoding.py`, what exits are worth in speed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerskip_moe.analysis.figures.drawing import (
    GREY,
    SERIES,
    drawable,
    drawables,
    heat_map,
    label,
    labels_beside,
    legend_outside,
    new_panels,
    scale_for_ratios,
    thinned,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE = SERIES[0][0]


def perplexity_by_exit(perplexity: Sequence[float | None], agreement: Sequence[float]) -> "Figure":
    """Perplexity, and agreement with the last layer, of exit layers 1..L on held-out text."""
    layers = range(1, len(perplexity) + 1)
    figure, (left, right) = new_panels(2)
    finite, percent = drawables(perplexity), drawables(agreement, 100)
    left.plot(layers, finite, color=_BLUE, marker="o")
    right.plot(layers, percent, color=_BLUE, marker="o")
    left.set(title="Held-out perplexity", xlabel="exit layer")
    right.set(title="Same next token as the last layer", xlabel="exit layer", ylabel="% of positions")
    scale_for_ratios(left, "y", finite, "perplexity")
    right.set_ylim(0, 104)
    every = -(-len(layers) // 8)
    for axes, values, form, height in ((left, finite, "{:.3g}", 5), (right, percent, "{:.0f}%", -13)):
        for layer, value in zip(layers, values, strict=True):
            if (len(layers) - layer) % every == 0 and not math.isnan(value):
                label(axes, layer, value, form.format(value), GREY, offset=(4, height))
        whole_ticks(axes, layers)
    return figure


def early_exit_tradeoff(early_exit: Mapping[str, Any], full: float | None = None) -> "Figure":
    """Dynamic early exit over its thresholds: layers run, speed-up, agreement and held-out perplexity.

    early_exit: a report's section, with `held_out`, `decoding` or both. full: the held-out perplexity of all
    layers, for a line to compare with. The speed-up is the median over prompts of the ratio to plain decoding,
    with whiskers over the middle half. Thresholds stand at even distances, for they crowd towards 1. Agreement is
    with the full model: of the exit taken with the last layer at the same position (held out), of the text with the
    full model's choice after it (decoded, where that was greedy).
    Raises ValueError if neither part has a threshold.
    """
    held = early_exit.get("held_out") or {"thresholds": []}
    decoded = early_exit.get("decoding") or {}
    strategies = decoded.get("strategies") or []
    rows = [row for row in strategies if row.get("threshold") is not None]
    thresholds = sorted({*held["thresholds"], *(row["threshold"] for row in rows)})
    if not thresholds:
        raise ValueError("There are no thresholds to draw: early_exit has neither held-out nor decoded ones.")

    figure, panels = new_panels(4, height=6.2, columns=2)
    # A sampled token is seldom the most likely one, whoever chose it: only greedy text tells of agreement.
    greedy = "agreement" if not decoded.get("temperature") else None
    contents = (
        ("Layers run per token", "layers", "mean_layers", "mean_layers", 1),
        ("Speed-up of decoding", "times as fast as plain", None, "speed_up", 1),
        ("Agreement with the full model", "% of tokens", "agreement", greedy, 100),
        ("Held-out perplexity", "perplexity", "perplexity", None, 1),
    )
    handles: dict[str, Any] = {}
    for axes, (title, unit, held_field, row_field, factor) in zip(panels, contents, strict=True):
        curves, seen = [], False
        if held_field and held["thresholds"]:
            curves.append(("held-out text", held["thresholds"], held[held_field]))
        if row_field and rows:
            curves.append(("decoding", [row["threshold"] for row in rows], [row.get(row_field) for row in rows]))
        for name, at, values in curves:
            colour, marker, style = SERIES[name == "decoding"]
            pairs = sorted((thresholds.index(t), factor * drawable(v)) for t, v in zip(at, values, strict=True))
            x, y = zip(*pairs, strict=True)
            seen = seen or not all(map(math.isnan, y))
            (handles[name],) = axes.plot(x, y, color=colour, marker=marker, linestyle=style, label=name)
        if row_field == "speed_up" and rows:
            for row in rows:
                axes.vlines(thresholds.index(row["threshold"]), *row["speed_up_quartiles"], color=colour, alpha=0.5)
        reference = {"speed_up": 1.0 if rows else None, "perplexity": full}.get(row_field or held_field or "")
        if reference is not None and math.isfinite(reference):
            handles["full"] = axes.axhline(
                reference, color=GREY, linewidth=1, linestyle=":", label="full model (plain decoding)"
            )
        shown = thinned(len(thresholds), 11)
        axes.set_xticks(range(len(thresholds))[shown], [f"{t:g}" for t in thresholds[shown]])
        axes.set(title=title, ylabel=unit, xlabel="confidence threshold (not to scale)")
        axes.set_xlim(-0.5, len(thresholds) - 0.5)
        axes.margins(y=0.12)
        if not seen:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    legend_outside(figure, list(handles.values()), below=len(handles))
    return figure


def confidence_by_layer(held_out: Mapping[str, Any]) -> "Figure":
    """How sure each exit layer is on held-out text: the mean over positions, and the middle half of them.

    held_out: of a report's `early_exit`: confidence_mean, confidence_low, confidence_high [L], None where a
    layer has no confidence, and thresholds, of which those within reach are thin lines. Raises ValueError if no
    layer has a confidence.
    """
    mean, low, high = (drawables(held_out[f"confidence_{name}"]) for name in ("mean", "low", "high"))
    if all(math.isnan(value) for value in mean):
        raise ValueError("There is no confidence to draw: no exit layer has one.")
    layers = range(1, len(mean) + 1)
    figure, (axes,) = new_panels(1, width=8.5)
    band = axes.fill_between(layers, low, high, color="#9ecae1", linewidth=0, label="middle half\nof positions")
    axes.vlines(layers, low, high, color="#9ecae1", linewidth=2)  # a layer without neighbours has no area
    (line,) = axes.plot(layers, mean, color=_BLUE, marker="o", label="mean")
    axes.set(title="Confidence by exit layer", xlabel="exit layer", ylabel="confidence (at most 1)")
    axes.set_ylim(min(0.0, 1.1 * np.nanmin([*low, *mean])), 1.1 * max(np.nanmax([*high, *mean]), 0.01))
    whole_ticks(axes, layers)
    bottom, top = axes.get_ylim()
    reached = [threshold for threshold in held_out["thresholds"] if bottom < threshold < top]
    for threshold in reached:
        axes.axhline(threshold, color=GREY, linewidth=0.8, linestyle=":")
    right = axes.get_xlim()[1]
    labels_beside(axes, [(right, threshold, f"threshold {threshold:g}") for threshold in reached], gap=0.06)
    legend_outside(figure, [line, band])
    return figure


def exit_histogram(held_out: Mapping[str, Any]) -> "Figure":
    """Share of held-out tokens that leave after each layer, a row per threshold.

    held_out: of a report's `early_exit`: thresholds, and exits [thresholds][L]. Raises ValueError if empty.
    """
    names = [f"{threshold:g}" for threshold in held_out["thresholds"]]
    figure = _exit_shares(held_out["exits"], names)
    figure.axes[0].set(title="Where tokens leave", ylabel="confidence threshold")
    return figure


def exits_by_prompt(by_prompt: Mapping[str, Any]) -> "Figure":
    """Share of each prompt's new tokens that leave after each layer, at one threshold.

    by_prompt: of a report's `early_exit`: threshold, and exits [prompts][L]. Raises ValueError if empty.
    """
    exits = by_prompt["exits"]
    figure = _exit_shares(exits, [str(1 + prompt) for prompt in range(len(exits))])
    figure.axes[0].set(title=f"Where new tokens leave, threshold {by_prompt['threshold']:g}", ylabel="prompt")
    return figure


def _exit_shares(exits: Sequence[Sequence[int]], rows: Sequence[str]) -> "Figure":
    """A heat map of exits [rows][L], each row in % of its sum; a row without tokens is empty."""
    if not exits or not exits[0]:
        raise ValueError("There are no exits to draw; give counts per layer for at least one threshold or prompt.")
    counts = np.array(exits, dtype=np.float64)
    sums = counts.sum(axis=1, keepdims=True)
    percent = 100 * np.divide(counts, sums, out=np.full_like(counts, np.nan), where=sums > 0)
    n_rows, n_layers = counts.shape
    height = min(9, 1.7 + 0.3 * n_rows)
    figure, (axes,) = new_panels(1, width=min(9.5, 3.5 + 0.5 * n_layers), height=height)
    columns = [str(1 + layer) for layer in range(n_layers)]
    heat_map(figure, axes, percent, rows=rows, columns=columns, bar="% of the row's tokens")
    axes.set_xlabel("exit layer")
    return figure

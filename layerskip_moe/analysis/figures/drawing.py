"""What the figures share: panels, colours, ticks, labels, heat maps, and saving.

Colours differ in lightness as well as in hue, and series in marker and line style too, so that figures can be
read by the colour-blind and from a grey print. Legends stand outside the axes, where they cover no data.
What is missing (None, inf, nan) leaves a gap. Sizes are in inches, made for a notebook's 100 dots each.

Knows nothing of what is drawn. Next: the other files of this folder, one subject each.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layerskip_moe.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

GREY, PALE = "#6b6b6b", "#cfcfcf"
# Colour, marker and line style of series without an order; ordered ones take `shades`.
SERIES: tuple[tuple[str, str, Literal["-", "--", "-.", ":"]], ...] = (
    ("#00487f", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#56b4e9", "^", "-."),
    ("#009e73", "D", ":"),
)
MARKERS = "os^Dv"
AMOUNT = "Blues"  # of heat maps: white is nothing, dark is much


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as the path's suffix says (.png, .svg, .pdf); never half a file."""
    path = Path(path)
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix.removeprefix("."), dpi=150)


def new_panels(
    count: int, *, width: float = 9.5, height: float = 3.9, columns: int | None = None
) -> "tuple[Figure, list[Axes]]":
    """A figure of that size with `count` axes, row by row, side by side unless `columns` says how many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    columns = columns or count
    panels = [figure.add_subplot(-(-count // columns), columns, 1 + index) for index in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def drawable(value: float | None) -> float:
    """nan, which leaves a gap, for what a report could not measure or a diverged model made infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def drawables(values: Iterable[float | None], factor: float = 1) -> list[float]:
    """`drawable` of each value, times factor (100 for shares shown in %)."""
    return [factor * drawable(value) for value in values]


def shades(count: int) -> list[Any]:
    """Colours for an ordered series, from dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.0, 0.85, count)]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. count - 1, evenly spread, both ends among them."""
    shown = min(count, most)
    return sorted({round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)})


def edges(places: Sequence[float]) -> list[float]:
    """Borders of cells centred on increasing places: halfway between neighbours."""
    if len(places) == 1:
        return [places[0] - 0.5, places[0] + 0.5]
    between = [(left + right) / 2 for left, right in itertools.pairwise(places)]
    return [2 * places[0] - between[0], *between, 2 * places[-1] - between[-1]]


def thinned(count: int, most: int) -> slice:
    """Every n-th of `count` things, the last among them, so that at most `most` are left."""
    every = -(-count // most)
    return slice((count - 1) % every, None, every)


def whole_ticks(axes: "Axes", layers: Sequence[int], *, most: int = 16) -> None:
    """Ticks at whole layers, every one while there are at most `most`, with half a layer's room at the ends."""
    if layers:
        axes.set_xticks(layers[thinned(len(layers), most)])
        axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)


def step_ticks(axes: "Axes", *, most: int = 7) -> None:
    """Name the x axis "step", with ticks at whole steps only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def scale_for_ratios(axes: "Axes", name: Literal["x", "y"], values: Sequence[float], unit: str) -> None:
    """Scale and label x or y for values > 0: linear if they differ less than threefold, else log, and said so.

    Limits lie just around the values. A log scale has at least three ticks, round numbers written out.
    """
    from matplotlib.ticker import NullFormatter

    finite = [value for value in values if not math.isnan(value)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    if high < 3 * low:
        margin = 0.15 * (high - low) or 0.1 * high
        axes.set(**{f"{name}label": unit, f"{name}lim": (low - margin, high + margin)})
        return
    axes.set(**{f"{name}scale": "log", f"{name}label": f"{unit} (log scale)"})
    low, high = low / 1.25, high * 1.35
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    # The last always gives three: the limits are at least fivefold apart, any three of its steps at most 3.5.
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    ticks = ticks[thinned(len(ticks), 8)]
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter(NullFormatter())
    axes.set(**{f"{name}lim": (low, high)})


def label(
    axes: "Axes", x: float, y: float, text: str, colour: str, *, offset: tuple[int, int], align: str = "left"
) -> None:
    """Write text beside a point, `offset` points away."""
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=align, fontsize=8.5, color=colour)


def labels_beside(axes: "Axes", points: Sequence[tuple[float, float, str]], *, gap: float) -> None:
    """Write each point's text right of the axes, on its own line, tied to its point (x, y) by a thin one.

    gap: height of a line of text, as a share of the axes' height. Call it once the y limits are final.
    """
    low, high = axes.get_ylim()
    points = sorted(points, key=lambda point: point[1])
    places = [(y - low) / (high - low) for _, y, _ in points]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.0)
    for (x, y, text), place in zip(points, places, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": PALE, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
        )


def legend_outside(figure: "Figure", handles: Sequence[Any], *, below: int = 0) -> None:
    """One legend for all panels, in room of its own: right of them, or below them in that many columns."""
    place: Literal["outside lower center", "outside right upper"]
    place = "outside lower center" if below else "outside right upper"
    if handles:
        figure.legend(handles=handles, loc=place, ncols=below or 1, frameon=False, fontsize=9)


def heat_map(
    figure: "Figure",
    axes: "Axes",
    values: "np.ndarray[Any, Any]",
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    bar: str,
    cmap: str = AMOUNT,
    norm: "Normalize | None" = None,
) -> "Colorbar":
    """Draw values [rows, columns] as coloured cells with a colour bar, named `bar`, which is returned.

    Values are written into the cells as whole numbers, "<1" for those that would round to 0, while there is
    room; with more rows or columns than names fit, every n-th is named, the last among them. nan is an empty
    cell. norm: of the colours; None: from 0 to the largest.
    """
    from matplotlib.colors import Normalize

    n_rows, n_columns = values.shape
    norm = norm or Normalize(0, np.nanmax(values, initial=0.0) or 1.0)
    image = axes.imshow(values, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    if n_columns <= 16 and n_rows <= 24:
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                red, green, blue, _ = image.to_rgba(value)
                colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
                text = "<1" if 0 < value < 0.5 else f"{value:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    across, down = thinned(n_columns, 16), thinned(n_rows, 24)
    axes.set_xticks(range(n_columns)[across], columns[across])
    axes.set_yticks(range(n_rows)[down], rows[down])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return colour_bar(figure, axes, image, bar)


def colour_bar(figure: "Figure", axes: "Axes", image: Any, name: str, **options: Any) -> "Colorbar":
    """What the colours of an image, mesh or filled contour mean, right of its axes."""
    bar = figure.colorbar(image, ax=axes, label=name, **options)
    bar.outline.set_visible(False)
    return bar

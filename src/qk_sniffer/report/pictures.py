"""The pictures of a report, drawn for a light or a dark page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image

from qk_sniffer.report.measures import HeadMap

Theme = Literal["light", "dark"]

_COLOURS = {"light": ("#ffffff", "#1f2328", "#d8dee4"), "dark": ("#14181d", "#e6edf3", "#343b44")}
"""Of page, text and cells without a number."""
_MOST_WRITTEN_CELLS = 120
_SIZE = 5.4, 3.9
_DOTS_PER_INCH = 160
_MOST_COLOURS = 256
_MONOSPACE = "DejaVu Sans Mono"  # comes with matplotlib


@dataclass(frozen=True)
class HeadPoints:
    """The vectors of a head along their first two principal components.

    Attributes:
        points: (N, 2).
        shares: (2,) of the whole variance.
        positions: (N,).
    """

    points: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int32]


@dataclass(frozen=True)
class AttentionPicture:
    """The attention of some queries to some keys.

    Attributes:
        shares: (Q, K).
        query_labels: (Q,) position of each query, and its token where it is known.
        key_labels: (K,) of each key.
    """

    shares: npt.NDArray[np.float32]
    query_labels: Sequence[str]
    key_labels: Sequence[str]


def draw_rows(layers: Sequence[int], buckets: Sequence[int], rows: Any, theme: Theme) -> bytes:
    """Rows that one head of each layer keeps in each bucket, as a PNG."""
    with _themed(theme):
        figure, axes = _figure()
        image = axes.imshow(rows, aspect="auto", cmap="viridis", origin="lower", vmin=0)
        _label_cells(axes, np.asarray(rows, float), "{:,.0f}", image)
        _number_axis(axes.xaxis, buckets)
        _number_axis(axes.yaxis, layers)
        axes.set(xlabel="bucket", ylabel="layer")
        figure.colorbar(image, label="rows of a head")
        return _png(figure)


def draw_head_map(
    heads: HeadMap,
    label: str,
    theme: Theme,
    *,
    form: str,
    limits: tuple[float, float] | None = None,
) -> bytes:
    """A number for each head, as a map of layers and heads, as a PNG.

    Args:
        heads: The numbers.
        label: What they are.
        theme: The page.
        form: How a number is written.
        limits: Ends of the colour scale; None takes them from the numbers.
    """
    low, high = limits or (None, None)
    with _themed(theme):
        figure, axes = _figure()
        axes.set_facecolor(_COLOURS[theme][2])
        image = axes.imshow(
            heads.values, aspect="auto", cmap="viridis", origin="lower", vmin=low, vmax=high
        )
        _label_cells(axes, heads.values, form, image)
        _number_axis(axes.xaxis, heads.heads)
        _number_axis(axes.yaxis, heads.layers)
        axes.set(xlabel="head", ylabel="layer")
        beyond = "min" if low is not None and np.nanmin(heads.values, initial=low) < low else "neither"
        figure.colorbar(image, label=label, extend=beyond)
        return _png(figure)


def draw_points(points: HeadPoints, theme: Theme) -> bytes:
    """Principal components coloured by position, as a PNG."""
    with _themed(theme):
        figure, axes = _figure()
        order = np.random.default_rng(0).permutation(len(points.points))
        dots = axes.scatter(
            *points.points[order].T,
            c=points.positions[order],
            s=6,
            alpha=0.8,
            linewidths=0,
            cmap="viridis" if theme == "light" else "plasma",
        )
        for name, share in zip("xy", points.shares, strict=True):
            axes.set(**{f"{name}label": f"component {'xy'.index(name) + 1} ({share:.0%} of variance)"})
        figure.colorbar(dots, label="position")
        return _png(figure)


def draw_attention(attention: AttentionPicture, label: str, theme: Theme) -> bytes:
    """Shares of keys by query, with the tokens beside them, as a PNG."""
    n_queries, n_keys = attention.shares.shape
    with _themed(theme):
        figure, axes = _figure((max(4.0, 2.4 + 0.15 * n_keys), max(3.0, 1.3 + 0.15 * n_queries)))
        image = axes.imshow(
            attention.shares,
            cmap="magma" if theme == "dark" else "magma_r",
            norm=PowerNorm(0.5, 0, 1),
            aspect="equal",
        )
        style = {"fontsize": 6.5, "family": _MONOSPACE}
        axes.set_xticks(range(n_keys), map(_drawable, attention.key_labels), rotation=90, **style)
        axes.set_yticks(range(n_queries), map(_drawable, attention.query_labels), **style)
        axes.tick_params(length=0)
        axes.set(xlabel="key", ylabel="query")
        figure.colorbar(image, label=label, shrink=0.7)
        return _png(figure)


def _drawable(text: str) -> str:
    """What the font has no sign for, by its number."""
    known = get_font(findfont(_MONOSPACE)).get_charmap()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)


def _themed(theme: Theme) -> Any:
    page, text, _ = _COLOURS[theme]
    return matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9,
            "figure.facecolor": page,
            "axes.facecolor": page,
            "savefig.facecolor": page,
            "axes.edgecolor": text,
            "axes.labelcolor": text,
            "text.color": text,
            "xtick.color": text,
            "ytick.color": text,
            "text.parse_math": False,
        }
    )


def _figure(size: tuple[float, float] = _SIZE) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    return figure, figure.subplots()


def _number_axis(axis: Any, numbers: Sequence[int]) -> None:
    """Whole numbers, which need not follow each other, at the middle of their cells."""
    places = [int(p) for p in MaxNLocator(12, integer=True).tick_values(0, len(numbers) - 1)]
    places = (
        [p for p in places if 0 <= p < len(numbers)] if len(numbers) > 12 else [*range(len(numbers))]
    )
    axis.set_ticks(places, [f"{numbers[place]}" for place in places])


def _label_cells(axes: Any, values: npt.NDArray[np.float64], form: str, image: Any) -> None:
    """Write the number into each cell of a small map, in the colour that shows on it."""
    if values.size > _MOST_WRITTEN_CELLS or values.shape[1] > 16:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            colour = "black" if is_bright else "white"
            axes.text(column, row, form.format(value), ha="center", va="center", color=colour, size=7)


def _png(figure: Figure) -> bytes:
    canvas: Any = FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
    file = io.BytesIO()
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # A palette makes the page a third as large.
    drawn.quantize(_MOST_COLOURS, dither=Image.Dither.NONE).save(file, format="png")
    return file.getvalue()

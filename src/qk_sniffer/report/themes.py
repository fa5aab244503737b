"""Pictures as PNGs, for a light and a dark page."""

import io
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from qk_sniffer.report.page import Picture

Theme = Literal["light", "dark"]
Draw = Callable[[Axes], None]

_COLOURS = {"light": ("#ffffff", "#1f2328"), "dark": ("#14181d", "#e6edf3")}
"""Of page and text."""
_MAPS = {"light": "viridis", "dark": "cool"}
"""Of dots, so that both ends show on the page."""
_SIZE = 5.0, 3.8
_DOTS_PER_INCH = 160
_MOST_COLOURS = 256


def picture(
    name: str,
    caption: str,
    draw: Draw,
    *,
    size: tuple[float, float] = _SIZE,
    is_wide: bool = False,
) -> Picture:
    """A picture for both pages.

    Args:
        name: Of its file, without ending.
        caption: What it shows.
        draw: Draws it on axes.
        size: Width and height in inches.
        is_wide: Whether it is scrolled on a narrow screen and not made smaller.
    """
    return Picture(name, caption, _png(draw, "light", size), _png(draw, "dark", size), is_wide)


def _png(draw: Draw, theme: Theme, size: tuple[float, float]) -> bytes:
    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
        draw(figure.subplots())
        canvas: Any = FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
        canvas.draw()
    file = io.BytesIO()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # A palette makes the page a third as large.
    drawn.quantize(_MOST_COLOURS, dither=Image.Dither.NONE).save(file, format="png")
    return file.getvalue()


def _settings(theme: Theme) -> dict[Any, Any]:
    page, text = _COLOURS[theme]
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "image.cmap": _MAPS[theme],
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

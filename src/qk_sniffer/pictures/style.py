"""What the pictures share: axes, colours for light and dark pages, and signs of the font."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

MONOSPACE = "DejaVu Sans Mono"  # comes with matplotlib

_MOST_DOTS = 4_000
_MOST_NUMBERS = 12


def new_axes(size: tuple[float, float] | None = None) -> Axes:
    """Axes on a figure of their own, which a notebook shows.

    Args:
        size: Width and height in inches; None takes matplotlib's setting.
    """
    _, axes = pyplot.subplots(figsize=size, layout="constrained")
    return axes


def is_bright(colour: Any) -> bool:
    """Whether black shows on a colour better than white; the weights are those of BT.601."""
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))) > 0.55


def grey_behind(axes: Axes) -> None:
    """Let cells without a number be grey."""
    axes.set_facecolor("0.84" if is_bright(axes.get_facecolor()) else "0.26")


def spread_evenly(count: int) -> npt.NDArray[np.int64]:
    """The indices of some of many dots, evenly spread, so that a picture shows them apart."""
    return np.linspace(0, count - 1, min(_MOST_DOTS, count)).astype(np.int64)


def number_axis(axis: Any, numbers: Sequence[int]) -> None:
    """Whole numbers, which need not follow each other, at the middle of their cells."""
    places = list(range(len(numbers)))
    if len(numbers) > _MOST_NUMBERS:
        ticks = MaxNLocator(_MOST_NUMBERS, integer=True).tick_values(0, len(numbers) - 1)
        places = [int(place) for place in ticks if 0 <= place < len(numbers)]
    axis.set_ticks(places, [f"{numbers[place]}" for place in places])


def drawable(text: str) -> str:
    """What the font has no sign for, by its number."""
    known = get_font(findfont(MONOSPACE)).get_charmap()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)

"""Maps of all heads: a number for each of them, and the rows that they keep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from qk_sniffer.pictures.style import grey_behind, is_bright, number_axis

_MOST_WRITTEN_CELLS, _MOST_WRITTEN_COLUMNS = 120, 12


def draw_rows(axes: Axes, layers: Sequence[int], buckets: Sequence[int], rows: npt.ArrayLike) -> None:
    """Rows that one head of each layer keeps in each bucket.

    Args:
        axes: Where it is drawn.
        layers: (L,) numbers of the layers.
        buckets: (B,) numbers of the buckets.
        rows: (L, B).
    """
    values = np.asarray(rows, float)
    _draw_cells(axes, values, "rows of a head", form="{:,.0f}", limits=(0, None))
    number_axis(axes.xaxis, buckets)
    number_axis(axes.yaxis, layers)
    axes.set(xlabel="bucket", ylabel="layer")


def draw_head_map(
    axes: Axes,
    layers: Sequence[int],
    heads: Sequence[int],
    values: npt.NDArray[np.float64],
    label: str,
    *,
    form: str,
    limits: tuple[float, float | None] | None = None,
) -> None:
    """A number for each head, as a map of layers and heads.

    Args:
        axes: Where it is drawn.
        layers: (L,) numbers of the layers.
        heads: (H,) numbers of the heads.
        values: (L, H); NaN is grey.
        label: What they are.
        form: How a number is written.
        limits: Ends of the colour scale; None takes them, or the upper one, from the numbers.
    """
    grey_behind(axes)
    _draw_cells(axes, values, label, form=form, limits=limits or (None, None))
    number_axis(axes.xaxis, heads)
    number_axis(axes.yaxis, layers)
    axes.set(xlabel="head", ylabel="layer")


def _draw_cells(
    axes: Axes,
    values: npt.NDArray[np.float64],
    label: str,
    *,
    form: str,
    limits: tuple[float | None, float | None],
) -> None:
    low, high = limits
    image = axes.imshow(values, aspect="auto", cmap="viridis", origin="lower", vmin=low, vmax=high)
    beyond = "min" if low is not None and np.nanmin(values, initial=low) < low else "neither"
    axes.figure.colorbar(image, ax=axes, label=label, extend=beyond)
    if values.size <= _MOST_WRITTEN_CELLS and values.shape[1] <= _MOST_WRITTEN_COLUMNS:
        _write_cells(axes, values, form, image)


def _write_cells(axes: Axes, values: npt.NDArray[np.float64], form: str, image: Any) -> None:
    """Write the number into each cell, in the colour that shows on it."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if is_bright(image.cmap(image.norm(value))) else "white"
            axes.text(column, row, form.format(value), ha="center", va="center", color=colour, size=7)

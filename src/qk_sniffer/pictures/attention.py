"""The attention of some queries to some keys, as a map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from qk_sniffer.pictures.style import MONOSPACE, drawable, grey_behind, is_bright

_CELL = 0.165
"""Width and height in inches of a cell whose label is legible."""
_LARGEST = 14.0
_BAR = 1.9
"""Inches of the colour bar, which a narrow screen shows before it is scrolled."""
_TICKS = [0, 0.05, 0.25, 0.5, 1]


@dataclass(frozen=True)
class AttentionMap:
    """The attention of some queries to some keys.

    Attributes:
        shares: (Q, K) probabilities, or shares among the keys that were kept.
        is_attended: (Q, K) bool; a key behind its query or outside a window is not.
        query_labels: (Q,) position of each query, and its token where it is known.
        key_labels: (K,) of each key.
        measure: What the shares are.
    """

    shares: npt.NDArray[np.float32]
    is_attended: npt.NDArray[np.bool_]
    query_labels: Sequence[str]
    key_labels: Sequence[str]
    measure: str


def attention_size(attention: AttentionMap) -> tuple[float, float]:
    """Width and height in inches of a figure on which its labels are legible."""
    n_queries, n_keys = attention.shares.shape
    labels = [0.075 * max(map(len, found)) for found in (attention.query_labels, attention.key_labels)]
    width, height = labels[0] + _CELL * n_keys + 0.4, labels[1] + _CELL * n_queries + 1.0
    return min(max(3.4, width), _LARGEST), min(max(3.0, height), _LARGEST)


def draw_attention(axes: Axes, attention: AttentionMap) -> None:
    """The share of each key by query; grey where a query does not attend."""
    n_keys = attention.shares.shape[1]
    is_light = is_bright(axes.get_facecolor())
    grey_behind(axes)
    image = axes.imshow(
        np.ma.masked_where(~attention.is_attended, attention.shares),
        cmap="magma_r" if is_light else "magma",
        norm=PowerNorm(0.5, 0, 1),
        aspect="equal",
    )
    for axis, labels in ((axes.xaxis, attention.key_labels), (axes.yaxis, attention.query_labels)):
        some = range(0, len(labels), 1 + int(_CELL * len(labels) / _LARGEST))
        axis.set_ticks(some, [drawable(labels[i]) for i in some], fontsize=7.5, family=MONOSPACE)
    axes.tick_params(length=0)
    axes.tick_params("x", rotation=90)
    axes.set(xlabel="key", ylabel="query")
    # Above the map and at its left, so that a narrow screen has it on.
    bar = axes.figure.colorbar(
        image,
        ax=axes,
        location="top",
        anchor=(0.0, 0.0),
        shrink=min(1.0, _BAR / (_CELL * n_keys)),
        aspect=16,
        pad=0.02,
        ticks=_TICKS,
        format="{x:g}",
    )
    bar.set_label(f"{attention.measure}, square-root scale", loc="left")

"""Curves over position, distance and pairs of coordinates."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from qk_sniffer.geometry import means_along

Curves = Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""By label: (N,) positions or distances, and (N,) values."""


def draw_norms_by_position(axes: Axes, curves: Curves) -> None:
    """Mean norm of the vectors by position; a sink shows at position 0.

    Args:
        axes: Where it is drawn.
        curves: Positions and norms of the vectors of each head.
    """
    _draw_means(axes, curves)
    axes.set(xlabel="position", ylabel="mean norm")
    axes.set_ylim(bottom=0)


def draw_norms_by_pair(axes: Axes, norms: Mapping[str, npt.NDArray[Any]]) -> None:
    """Mean norm by pair of coordinates i and i + head_dim/2.

    Args:
        axes: Where it is drawn.
        norms: By label, (head_dim/2,) what ``geometry.pair_norms`` gives.
    """
    for label, values in norms.items():
        axes.plot(range(len(values)), values, marker="o", markersize=3, label=label)
    axes.set(xlabel="pair of coordinates: i and i + head_dim/2", ylabel="mean norm")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_attention_by_distance(axes: Axes, curves: Curves) -> None:
    """Mean probability of a key by its distance from the query.

    Args:
        axes: Where it is drawn.
        curves: Distances and probabilities of each head.
    """
    _draw_means(axes, curves)
    axes.set(xlabel="distance from query to key", ylabel="mean probability of a key", yscale="log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def draw_attention_to_first(axes: Axes, curves: Curves) -> None:
    """Mean probability of the first token by position of the query.

    Args:
        axes: Where it is drawn.
        curves: Positions of the queries and probabilities of each head.
    """
    _draw_means(axes, curves)
    axes.set(xlabel="position of the query", ylabel="probability of the first token")
    axes.set_ylim(-0.02, 1.02)


def _draw_means(axes: Axes, curves: Curves) -> None:
    """Means in bins that widen, on an axis that is linear from 0 to 1 and logarithmic beyond."""
    for label, (places, values) in curves.items():
        axes.plot(*means_along(places, values), marker="o", markersize=3, label=label)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(frameon=False)

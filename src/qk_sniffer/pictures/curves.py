"""Curves over position, distance and pairs of coordinates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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


def draw_spectra(
    axes: Axes, spectra: Sequence[npt.NDArray[Any]], named: Mapping[str, npt.NDArray[Any]]
) -> None:
    """The share of the variance that the first principal components hold, by how many they are.

    Args:
        axes: Where it is drawn.
        spectra: (D,) shares of the variance along each component, descending, of each head.
        named: Some of them, which stand out, by label.
    """
    for shares in spectra:
        axes.plot(_from_one(shares), shares.cumsum(), color="0.55", linewidth=0.6, alpha=0.5)
    for label, shares in named.items():
        axes.plot(_from_one(shares), shares.cumsum(), linewidth=1.8, label=label)
    axes.set(xlabel="principal components", ylabel="share of the variance")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="lower right", frameon=False)


def _from_one(shares: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.arange(1, len(shares) + 1)


def _draw_means(axes: Axes, curves: Curves) -> None:
    """Means in bins that widen, on an axis that is linear from 0 to 1 and logarithmic beyond."""
    for label, (places, values) in curves.items():
        axes.plot(*means_along(places, values), marker="o", markersize=3, label=label)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(frameon=False)

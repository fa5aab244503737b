"""Principal components of the vectors of a head, by position."""

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from qk_sniffer.geometry import TellingComponents


def draw_components(axes: Axes, components: TellingComponents, positions: npt.ArrayLike) -> None:
    """The vectors along two components: a dot for each, coloured by position, or on a ring by phase.

    Args:
        axes: Where it is drawn.
        components: Of N vectors.
        positions: (N,) their positions.
    """
    places = np.asarray(positions)
    period = components.period
    colours, scale, label = (
        (places, None, "position")
        if period is None
        else (places % period, "twilight", f"position modulo {_number(period)}")
    )
    # In a random order, so that no position covers the others.
    order = np.random.default_rng(0).permutation(len(places))
    x, y = components.coordinates[order].T
    # The edges show the ends of a cyclic scale, which are as bright or as dark as a page.
    edge = 0.0 if period is None else 0.3
    area = np.clip(4_000 / len(places), 8, 30)
    dots = axes.scatter(x, y, c=colours[order], s=area, cmap=scale, edgecolors="0.5", linewidths=edge)
    first, second = (
        f"component {number} ({share:.0%} of variance)"
        for number, share in zip(components.numbers, components.shares, strict=True)
    )
    axes.set(xlabel=first, ylabel=second)
    axes.figure.colorbar(dots, ax=axes, label=label)


def describe_components(components: TellingComponents) -> str:
    """What ``draw_components`` shows, in a sentence without its full stop."""
    first, second = components.numbers
    if components.period is not None:
        return (
            f"components {first} and {second} turn with position, once in "
            f"{_number(components.period)} tokens; colour is the phase"
        )
    if components.is_line:
        return (
            f"component {first} carries position (squared correlation {components.r2:.2f}), drawn "
            f"against component {second}; colour is position"
        )
    return (
        f"no component tells position by itself and no pair turns steadily with it, so these are "
        f"components {first} and {second}; colour is position"
    )


def _number(period: float) -> str:
    return f"{period:.1f}" if period < 100 else f"{period:,.0f}"

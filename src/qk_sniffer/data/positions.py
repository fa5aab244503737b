"""Positions to keep that come with the texts."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Positions = npt.NDArray[np.int64]


def positions_in(values: Any) -> Positions | None:
    """The positions in a list, an array or a tensor: (P,) int64, ascending, each once.

    None where these are no integers of at least 0. Those beyond any text are left out.
    """
    try:
        found = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except ValueError:
        return None
    if found.ndim == 1 and found.size == 0:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0:
        return None
    found = np.unique(found)
    return found[found < 2**31].astype(np.int64)


def lists_in(values: Any, size: int) -> list[Positions] | None:
    """The positions of each of some texts; None where these are no such lists, or not so many."""
    try:
        found = [positions_in(some) for some in values]
    except TypeError:
        return None
    lists = [positions for positions in found if positions is not None]
    return lists if len(lists) == len(found) == size else None

"""Positions to keep that come with a text."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


def positions_in(values: Any) -> npt.NDArray[np.int64] | None:
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

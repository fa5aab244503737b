"""The statistics of queries: six float32 a row in a journal, columns of their own in a head's file."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.kinds import SOFTMAX_COLUMNS


def as_columns(values: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """The columns of some rows.

    Args:
        values: (N, 6), of which argmax_position has the bits of an int32.

    Returns:
        (N,) float32 each, and int32 for argmax_position.
    """
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(values[:, number]) for number, name in enumerate(SOFTMAX_COLUMNS)
    }
    columns["argmax_position"] = columns["argmax_position"].view(np.int32)
    return columns


def as_values(table: pa.Table) -> npt.NDArray[np.float32]:
    """What ``as_columns`` takes, of the columns of a table."""
    values = np.empty((table.num_rows, len(SOFTMAX_COLUMNS)), np.float32)
    for number, name in enumerate(SOFTMAX_COLUMNS):
        values[:, number] = table[name].to_numpy().view(np.float32)
    return values

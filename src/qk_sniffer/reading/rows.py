"""Rows of a head's file as NumPy arrays and torch tensors, at once or a row group at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.storage import fault_of_columns, fault_of_values, head_schema

NUMBERS = ("bucket", "example_id", "position")
"""The columns of numbers that every row has."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a ``UserError``."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, first_line(error)) from error


def open_head(path: Path, head_dim: int) -> ds.Dataset:
    """A head's file, as a dataset of Arrow's.

    Args:
        path: The file.
        head_dim: Length of a vector.

    Raises:
        UserError: It is damaged, or has other columns than a head.
    """
    with readable(path):
        if fault := fault_of_columns(path, head_schema(head_dim)):
            raise _unreadable(path, fault)
        return ds.dataset(path, format="parquet")


def read_rows(
    path: Path,
    rows: ds.Dataset | ds.Fragment,
    columns: list[str] | None,
    condition: ds.Expression | None,
) -> pa.Table:
    """Some rows of a head's file.

    Args:
        path: The file.
        rows: All of it, or one of its row groups.
        columns: Those that are read; None reads all.
        condition: Which rows are read; None reads all.

    Raises:
        UserError: The file is damaged, or a value is missing.
    """
    with readable(path):
        table = rows.to_table(columns=columns, filter=condition)
    if fault := fault_of_values(table):
        raise _unreadable(path, fault)
    return table


def _unreadable(path: Path, fault: str) -> UserError:
    return UserError(
        f"{path}: can't be read ({fault}); `qk-sniffer verify` tells which files of a data root are "
        "damaged, and a copy or a new run brings them back"
    )


def arrays(table: pa.Table, head_dim: int) -> dict[str, npt.NDArray[Any]]:
    """The vectors of N rows, (N, head_dim) float32, and their numbers, (N,) int32, in own memory."""
    vectors = np.empty((table.num_rows, head_dim), np.float32)
    first = 0
    for chunk in table["vector"].chunks:
        vectors[first : first + len(chunk)] = chunk.flatten().to_numpy().reshape(-1, head_dim)
        first += len(chunk)
    return {"vector": vectors} | {name: table[name].to_numpy().copy() for name in NUMBERS}


def tensors(table: pa.Table, head_dim: int) -> dict[str, Tensor]:
    """What ``arrays`` gives, as tensors."""
    return {name: torch.from_numpy(values) for name, values in arrays(table, head_dim).items()}


class HeadBatches(IterableDataset[dict[str, Tensor]]):
    """Batches of a head's rows; see ``Head.batches``.

    Args:
        path: The head's file.
        condition: Which rows are read; None reads all.
        head_dim: Length of a vector.
        batch_size: Rows in a batch.
        shuffle: Whether the order is random.
    """

    def __init__(
        self,
        path: Path,
        condition: ds.Expression | None,
        head_dim: int,
        batch_size: int,
        shuffle: bool,
    ) -> None:
        self._path = path
        self._condition = condition
        self._head_dim = head_dim
        self._batch_size = batch_size
        self._shuffle = shuffle

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        dataset = open_head(self._path, self._head_dim)
        with readable(self._path):
            file = next(dataset.get_fragments())
            groups = file.split_by_row_group(self._condition)[number::n_workers]
        for index in self._order(len(groups)):
            # A function of its own, so that a row group is let go of before the next is read.
            yield from self._of_group(groups[index])

    def _of_group(self, group: ds.Fragment) -> Iterator[dict[str, Tensor]]:
        rows = tensors(
            read_rows(self._path, group, ["vector", *NUMBERS], self._condition), self._head_dim
        )
        for batch in torch.split(self._order(len(rows["vector"])), self._batch_size):
            yield {name: values[batch] for name, values in rows.items()}

    def _order(self, count: int) -> Tensor:
        # A worker's generator is seeded by the loader: its own, and another one in each epoch.
        return torch.randperm(count) if self._shuffle else torch.arange(count)

"""Rows of a head's files as NumPy arrays and torch tensors, at once or a row group at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
from torch.utils.data._utils.collate import default_collate_fn_map

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.kinds import SOFTMAX_COLUMNS
from qk_sniffer.storage import fault_of_columns, fault_of_values

NUMBERS = ("bucket", "example_id", "position")
"""The columns of numbers that every row has."""


def numbers_of(schema: pa.Schema) -> list[str]:
    """The columns of numbers of a head: those of every row, and the statistics of queries."""
    return [*NUMBERS, *(name for name in SOFTMAX_COLUMNS if name in schema.names)]


class HeadRows(ABC):
    """Where the rows of a head are read from."""

    @abstractmethod
    def read(
        self, columns: list[str] | None = None, condition: ds.Expression | None = None
    ) -> pa.Table:
        """Some rows, sorted by example_id and position.

        Args:
            columns: Those that are read; None reads all.
            condition: Which rows are read; None reads all.

        Raises:
            UserError: The file is damaged, or a value is missing.
        """

    def tensors(self, schema: pa.Schema, condition: ds.Expression | None = None) -> dict[str, Tensor]:
        """Vectors and numbers of some rows, as ``tensors`` gives them.

        Args:
            schema: The head's.
            condition: Which rows are read; None reads all.
        """
        return tensors(self.read(["vector", *numbers_of(schema)], condition))

    @abstractmethod
    def count(self, condition: ds.Expression | None) -> int:
        """How many rows fulfil a condition; None counts all."""

    @abstractmethod
    def groups(self, condition: ds.Expression | None) -> "Sequence[HeadRows]":
        """The same in parts that are read at once; those without such rows may be left out."""


class TableRows(HeadRows):
    """Rows in memory.

    Args:
        table: Gives them.
    """

    def __init__(self, table: Callable[[], pa.Table]) -> None:
        self._table = table

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is spawned gets the rows, and not what makes them.
        return _of_table, (self._table(),)

    def read(
        self, columns: list[str] | None = None, condition: ds.Expression | None = None
    ) -> pa.Table:
        """Some of them."""
        table = self._table()
        if condition is None:
            return table if columns is None else table.select(columns)
        return ds.dataset(table).to_table(columns=columns, filter=condition)

    def count(self, condition: ds.Expression | None) -> int:
        """How many rows fulfil a condition; None counts all."""
        return int(ds.dataset(self._table()).count_rows(filter=condition))

    def groups(self, condition: ds.Expression | None) -> Sequence[HeadRows]:
        """All of them at once."""
        return [self]


def _of_table(table: pa.Table) -> TableRows:
    return TableRows(lambda: table)


class FileRows(HeadRows):
    """Rows of a head's Parquet files, which are opened when they are asked for.

    Args:
        paths: Gives the files in order, which may have to come here first.
        schema: The columns that they must have.
    """

    def __init__(self, paths: Callable[[], Sequence[Path]], schema: pa.Schema) -> None:
        self._paths = paths
        self._schema = schema

    def read(
        self, columns: list[str] | None = None, condition: ds.Expression | None = None
    ) -> pa.Table:
        """Some of them."""
        paths = self._paths()
        return _read(paths[0], self._open(paths), columns, condition)

    def count(self, condition: ds.Expression | None) -> int:
        """How many rows fulfil a condition; None counts all.

        Raises:
            UserError: A file is damaged, or has other columns than a head.
        """
        paths = self._paths()
        dataset = self._open(paths)
        with _readable(paths[0]):
            return int(dataset.count_rows(filter=condition))

    def groups(self, condition: ds.Expression | None) -> Sequence[HeadRows]:
        """The row groups of the files.

        Raises:
            UserError: A file is damaged, or has other columns than a head.
        """
        found = []
        for path in self._paths():
            dataset = self._open([path])
            with _readable(path):
                file = next(dataset.get_fragments())
                found += [_GroupRows(path, group) for group in file.split_by_row_group(condition)]
        return found

    def _open(self, paths: Sequence[Path]) -> ds.Dataset:
        for path in paths:
            with _readable(path):
                if fault := fault_of_columns(path, self._schema):
                    raise _unreadable(path, fault)
        with _readable(paths[0]):
            return ds.dataset([str(path) for path in paths], format="parquet")


class _GroupRows(HeadRows):
    """One row group of a head's file."""

    def __init__(self, path: Path, group: ds.Fragment) -> None:
        self._path = path
        self._group = group

    def read(
        self, columns: list[str] | None = None, condition: ds.Expression | None = None
    ) -> pa.Table:
        return _read(self._path, self._group, columns, condition)

    def count(self, condition: ds.Expression | None) -> int:
        # count_rows of pyarrow counts those of the whole file.
        return int(_read(self._path, self._group, ["position"], condition).num_rows)

    def groups(self, condition: ds.Expression | None) -> Sequence[HeadRows]:
        return [self]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a ``UserError``."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, first_line(error)) from error


def _read(
    path: Path,
    rows: ds.Dataset | ds.Fragment,
    columns: list[str] | None,
    condition: ds.Expression | None,
) -> pa.Table:
    with _readable(path):
        table = rows.to_table(columns=columns, filter=condition)
    if fault := fault_of_values(table):
        raise _unreadable(path, fault)
    return table


def _unreadable(path: Path, fault: str) -> UserError:
    return UserError(
        f"{path}: can't be read ({fault}); `qk-sniffer verify` tells which files of a data root are "
        "damaged, and a copy or a new run brings them back"
    )


def arrays(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """The vectors of N rows, (N, width) float32, and their numbers, (N,) each, in own memory."""
    width = table.schema.field("vector").type.list_size
    vectors = np.empty((table.num_rows, width), np.float32)
    first = 0
    for chunk in table["vector"].chunks:
        vectors[first : first + len(chunk)] = chunk.flatten().to_numpy().reshape(-1, width)
        first += len(chunk)
    return {"vector": vectors} | {
        name: table[name].to_numpy().copy() for name in numbers_of(table.schema)
    }


def tensors(table: pa.Table) -> dict[str, Tensor]:
    """What ``arrays`` gives, as tensors."""
    return {name: torch.from_numpy(values) for name, values in arrays(table).items()}


class HeadBatch(dict[str, Any]):
    """Some rows by column: what ``tensors`` gives, and ``token_str`` where it was captured."""


def _collate(batches: list[HeadBatch], **_: Any) -> HeadBatch:
    """What a ``DataLoader`` makes of several: one batch of all their rows."""
    first, *more = batches
    if not more:
        return first
    return HeadBatch(
        {
            name: torch.cat([batch[name] for batch in batches])
            if isinstance(values, Tensor)
            else [value for batch in batches for value in batch[name]]
            for name, values in first.items()
        }
    )


default_collate_fn_map[HeadBatch] = _collate


class HeadBatches(IterableDataset[HeadBatch]):
    """Batches of a head's rows; see ``Head.batches``.

    Args:
        rows: Where they are read from.
        condition: Which rows are read; None reads all.
        schema: The columns of the head.
        batch_size: Rows in a batch.
        shuffle: Whether the order is random.
    """

    def __init__(
        self,
        rows: HeadRows,
        condition: ds.Expression | None,
        schema: pa.Schema,
        batch_size: int,
        shuffle: bool,
    ) -> None:
        self._rows = rows
        self._condition = condition
        self._schema = schema
        self._batch_size = batch_size
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Batches in all."""
        groups = self._rows.groups(self._condition)
        return sum(-(-group.count(self._condition) // self._batch_size) for group in groups)

    def __iter__(self) -> Iterator[HeadBatch]:
        worker = get_worker_info()
        number, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        groups = self._rows.groups(self._condition)[number::n_workers]
        for index in self._order(len(groups)):
            # A function of its own, so that a row group is let go of before the next is read.
            yield from self._of_group(groups[index])

    def _of_group(self, group: HeadRows) -> Iterator[HeadBatch]:
        table = group.read(["vector", *numbers_of(self._schema), "token_str"], self._condition)
        rows, strings = tensors(table), table["token_str"]
        has_strings = strings.null_count == 0
        for chosen in torch.split(self._order(table.num_rows), self._batch_size):
            batch = HeadBatch({name: values[chosen] for name, values in rows.items()})
            if has_strings:
                batch["token_str"] = strings.take(pa.array(chosen.numpy())).to_pylist()
            yield batch

    def _order(self, count: int) -> Tensor:
        # A worker's generator is seeded by the loader: its own, and another one in each epoch.
        return torch.randperm(count) if self._shuffle else torch.arange(count)

"""Where texts come from: Hub datasets and local files, and what can be wrong with them."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from lzma import LZMAError
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import xxhash
from datasets.exceptions import DatasetsError

from qk_sniffer.config import absent, described
from qk_sniffer.data.columns import column_of, has_values, names_in, value_of, values_of
from qk_sniffer.data.positions import lists_in
from qk_sniffer.data.text_files import DataFiles, Paths, builders, is_pattern
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.ids import collision, hash_ids

Row = dict[str, Any]

_ROWS_AT_ONCE = 16
_READ_ERRORS = (
    EOFError,
    LZMAError,
    OSError,
    StopIteration,
    ValueError,
    zlib.error,
    DatasetsError,
)
_FIELDS = {
    "split": "(Unknown|Bad) split",
    "name": "BuilderConfig .* not found|Config name is missing",
    "data_files": r"Unable to find '|No \(supported\) data files|Couldn't find cache for",
}
"""How a message of datasets begins that is about another field than path."""

_COMPRESSION = "Compression type zstd not supported"

_EMPTY = ("corresponds to no data", "No columns to parse", "BatchSize must be greater than 0")


@dataclass(frozen=True)
class TextSource:
    """A split of a Hub dataset, of local files, or a dataset that is in memory."""

    path: Paths
    name: str | list[str] | None
    revision: str | None
    split: str
    data_files: DataFiles | None = None
    in_memory: datasets.Dataset | None = None

    def load(self, max_samples: int | None) -> list[datasets.Dataset]:
        """The rows as map-style datasets, the first ``max_samples`` of them where that is given.

        Raises:
            UserError: The dataset can't be read, or has no rows.
        """
        parts, left = [], max_samples
        for part in self._open(streaming=False):
            if left is not None:
                part = part.select(range(min(left, len(part))))
                left -= len(part)
            if len(part):
                parts.append(part)
        if not parts:
            raise self.no_rows()
        return parts

    def stream(self, max_samples: int | None) -> "StreamedRows":
        """The same rows, read as they are asked for.

        Raises:
            UserError: The dataset can't be opened.
        """
        return StreamedRows(self, self._open(streaming=True), max_samples)

    def no_rows(self) -> UserError:
        """The error for an empty dataset."""
        return UserError(
            f"data.path: {described(self.path)} has no rows in split {self.split}; name another file "
            "or split"
        )

    def unreadable(self, error: Exception) -> UserError:
        """The error for a dataset that can't be read; an empty file shows in several odd ways."""
        reason = first_line(error.__cause__ or error)
        if isinstance(error, StopIteration) or any(words in reason for words in _EMPTY):
            return self.no_rows()
        field = next((field for field, start in _FIELDS.items() if re.match(start, reason)), "path")
        if field == "data_files" and self.data_files is None:
            field = "path"
        if _COMPRESSION in reason:
            return UserError(
                f"data.path: {described(self.path)} is compressed, and reading it needs the package "
                "zstandard; install it with `pip install zstandard`"
            )
        if field == "path" and isinstance(self.path, str) and not is_pattern(self.path):
            missing = absent("data.path", self.path, "file or directory", error)
            if missing is not None:
                return missing
        remedy = "mend it, or name another" if field == "path" else "name one that it has"
        if choices := re.search(r"available configs: (.*)", str(error)):
            reason = f"it has several configurations: {choices[1]}"
        # Every suffix that datasets knows follows, of pictures and sounds too.
        reason = re.sub(
            r" with any supported extension \[.*\]$", " with a suffix that datasets knows", reason
        )
        return UserError(f"data.{field}: {described(self.path)} can't be read ({reason}); {remedy}")

    def _open(self, *, streaming: bool) -> list[Any]:
        """Its parts, which are read one behind the other."""
        if self.in_memory is not None:
            return [self.in_memory.to_iterable_dataset() if streaming else self.in_memory]
        found = builders(self.path, self.data_files)
        names = self.name if isinstance(self.name, list) else [self.name]
        if isinstance(self.name, list) and any("data_files" in options for _, options in found):
            raise UserError(
                f"data.name: {described(self.path)} is read as files, which have no configurations; "
                "leave the list out"
            )
        parts = [(builder, name) for name in names for builder in found]
        try:
            return [self._load(*builder, name, streaming=streaming) for builder, name in parts]
        except _READ_ERRORS as error:
            raise self.unreadable(error) from error

    def _load(self, path: str, options: dict[str, Any], name: str | None, *, streaming: bool) -> Any:
        return datasets.load_dataset(
            path, name, split=self.split, revision=self.revision, streaming=streaming, **options
        )


def dataset_of(
    texts: Sequence[str], positions: Sequence[Sequence[int]] | None = None
) -> datasets.Dataset:
    """Strings as a dataset with the column text, and positions of each in the column positions.

    Raises:
        UserError: There are none, or they are something else.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError("texts: expected a list of strings or a datasets.Dataset")
    if not len(texts):
        raise UserError("texts: the list is empty; give at least one text")
    if positions is None:
        return datasets.Dataset.from_dict({"text": list(texts)})
    lists = lists_in(positions, len(texts))
    if lists is None:
        raise UserError(
            f"positions: expected {len(texts)} lists of integers of at least 0, one for each text"
        )
    return datasets.Dataset.from_dict({"text": list(texts), "positions": lists})


def digest_of(dataset: datasets.Dataset, columns: Sequence[str]) -> str:
    """What names the rows of a dataset that is in memory: XXH3 of some columns as JSON, 64 bits."""
    digest = xxhash.xxh3_64()
    columns = [*dict.fromkeys(column_of(dataset.features, name) for name in columns)]
    for rows in dataset.select_columns(columns).with_format(None).iter(_ROWS_AT_ONCE):
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class StreamedRows:
    """The numbered rows of a stream, all of them in every worker of a data loader.

    Raises:
        UserError: While iterating: a row can't be read, or there are none.
    """

    def __init__(
        self, source: TextSource, parts: list[datasets.IterableDataset], max_samples: int | None
    ) -> None:
        self.source = source
        self.parts = [part if max_samples is None else part.take(max_samples) for part in parts]
        self.max_samples = max_samples

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return islice(enumerate(self._rows()), self.max_samples)

    def _rows(self) -> Iterator[Row]:
        is_empty = True
        try:
            for part in self.parts:
                # Iterated row by row, a dataset would give each worker of a data loader a part of its
                # own.
                for columns in part.iter(_ROWS_AT_ONCE):
                    for values in zip(*columns.values(), strict=True):
                        yield dict(zip(columns, values, strict=True))
                        is_empty = False
        except _READ_ERRORS as error:
            raise self.source.unreadable(error) from error
        if is_empty:
            raise self.source.no_rows()

    def columns(self, row: Row) -> Mapping[str, Any]:
        """What is known of the columns that the first row has: their features, or else its values."""
        return self.parts[0].features or row


def check_columns(columns: Mapping[str, Any], named: Mapping[str, str | None]) -> None:
    """Refuse a dataset that lacks a column that the config names.

    Args:
        columns: Features by column, or a row.
        named: The column, or field inside a struct, that each field of the section data names; None for
            none.
    """
    for field, column in named.items():
        if column is not None and not has_values(columns, column):
            raise UserError(
                f"data.{field}: the dataset has no column {column!r}; choose from "
                f"{', '.join(names_in(columns))}"
            )


def example_ids(parts: Sequence[datasets.Dataset], id_column: str | None) -> npt.NDArray[np.int32]:
    """The example id of every row.

    They are one int32 array, so that memory holds 4 bytes a row; the source ids are read for an error's
    message alone.

    Args:
        parts: The rows, one part behind the other.
        id_column: Where their ids are; None numbers them.

    Raises:
        UserError: Two rows have one example id, or a source id is none.
    """
    sizes = [len(part) for part in parts]
    if id_column is None:
        return np.arange(sum(sizes), dtype=np.int32)
    firsts = np.cumsum([0, *sizes[:-1]])
    numbers = np.concatenate(
        [_hashed(part, id_column, int(first)) for part, first in zip(parts, firsts, strict=True)]
    )
    order = np.argsort(numbers, kind="stable")
    repeats = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
    if repeats.size:
        pair = order[repeats[0] : repeats[0] + 2]
        owners = np.searchsorted(firsts, pair, side="right") - 1
        rows = [parts[owner][int(row - firsts[owner])] for owner, row in zip(owners, pair, strict=True)]
        raise collision(*(value_of(row, id_column) for row in rows))
    return numbers


def _hashed(part: datasets.Dataset, id_column: str, first_row: int) -> npt.NDArray[np.int32]:
    """The example ids of the rows from ``first_row`` on."""
    column = column_of(part.features, id_column)

    def hashed(values: list[Any], rows: list[int]) -> dict[str, list[int]]:
        source_ids = values_of({column: values}, id_column)
        return {"example_id": hash_ids(source_ids, [first_row + row for row in rows])}

    ids = part.map(
        hashed,
        batched=True,
        with_indices=True,
        input_columns=[column],
        remove_columns=part.column_names,
        desc="Checking ids",
    )
    numbers: npt.NDArray[np.int32] = ids.with_format("numpy")["example_id"][:].astype(np.int32)
    return numbers

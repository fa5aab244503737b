"""Where texts come from: Hub datasets and local files, and what can be wrong with them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import xxhash
from datasets.exceptions import DatasetsError

from qk_sniffer.config import absent
from qk_sniffer.data.positions import lists_in
from qk_sniffer.data.text_files import builder_arguments, is_pattern
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.ids import collision, hash_ids

Row = dict[str, Any]

_ROWS_AT_ONCE = 16
_READ_ERRORS = (OSError, ValueError, StopIteration, DatasetsError)
_FIELDS = {"split": "(Unknown|Bad) split", "name": "BuilderConfig .* not found|Config name is missing"}
"""How a message of datasets begins that is about another field than path."""

_EMPTY = ("corresponds to no data", "No columns to parse", "BatchSize must be greater than 0")


@dataclass(frozen=True)
class TextSource:
    """A split of a Hub dataset, of local files, or a dataset that is in memory."""

    path: str
    name: str | None
    revision: str | None
    split: str
    in_memory: datasets.Dataset | None = None

    def load(self, max_samples: int | None) -> datasets.Dataset:
        """The rows as a map-style dataset, the first ``max_samples`` of them where that is given.

        Raises:
            UserError: The dataset can't be read, or has no rows.
        """
        dataset = self._open(streaming=False)
        if len(dataset) == 0:
            raise self.no_rows()
        if max_samples is not None:
            dataset = dataset.select(range(min(max_samples, len(dataset))))
        return dataset

    def stream(self, max_samples: int | None) -> "StreamedRows":
        """The same rows, read as they are asked for.

        Raises:
            UserError: The dataset can't be opened.
        """
        dataset = self._open(streaming=True)
        return StreamedRows(self, dataset if max_samples is None else dataset.take(max_samples))

    def no_rows(self) -> UserError:
        """The error for an empty dataset."""
        return UserError(
            f"data.path: {self.path} has no rows in split {self.split}; name another file or split"
        )

    def unreadable(self, error: Exception) -> UserError:
        """The error for a dataset that can't be read; an empty file shows in several odd ways."""
        reason = first_line(error.__cause__ or error)
        if isinstance(error, StopIteration) or any(words in reason for words in _EMPTY):
            return self.no_rows()
        field = next((field for field, start in _FIELDS.items() if re.match(start, reason)), "path")
        if field == "path" and not is_pattern(self.path):
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
        return UserError(f"data.{field}: {self.path} can't be read ({reason}); {remedy}")

    def _open(self, *, streaming: bool) -> Any:
        if self.in_memory is not None:
            return self.in_memory.to_iterable_dataset() if streaming else self.in_memory
        path, options = builder_arguments(self.path)
        try:
            return datasets.load_dataset(
                path,
                self.name,
                split=self.split,
                revision=self.revision,
                streaming=streaming,
                **options,
            )
        except _READ_ERRORS as error:
            raise self.unreadable(error) from error


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
    for rows in dataset.select_columns(list(columns)).with_format(None).iter(_ROWS_AT_ONCE):
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class StreamedRows:
    """The numbered rows of a stream, all of them in every worker of a data loader.

    Raises:
        UserError: While iterating: a row can't be read, or there are none.
    """

    def __init__(self, source: TextSource, dataset: datasets.IterableDataset) -> None:
        self.source = source
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        index = 0
        try:
            # Iterated row by row, a dataset would give each worker of a data loader a part of its own.
            for columns in self.dataset.iter(_ROWS_AT_ONCE):
                for values in zip(*columns.values(), strict=True):
                    yield index, dict(zip(columns, values, strict=True))
                    index += 1
        except _READ_ERRORS as error:
            raise self.source.unreadable(error) from error
        if index == 0:
            raise self.source.no_rows()


def check_columns(columns: Sequence[str], named: Mapping[str, str | None]) -> None:
    """Refuse a dataset that lacks a column that the config names.

    Args:
        columns: Those that it has.
        named: The column that each field of the section data names; None for none.
    """
    for field, column in named.items():
        if column is not None and column not in columns:
            raise UserError(
                f"data.{field}: the dataset has no column {column!r}; choose from {', '.join(columns)}"
            )


def example_ids(dataset: datasets.Dataset, id_column: str | None) -> npt.NDArray[np.int32]:
    """The example id of every row.

    They are one int32 array, so that memory holds 4 bytes a row; the source ids are read for an error's
    message alone.

    Raises:
        UserError: Two rows have one example id, or a source id is none.
    """
    if id_column is None:
        return np.arange(len(dataset), dtype=np.int32)
    hashed = dataset.map(
        lambda source_ids, rows: {"example_id": hash_ids(source_ids, rows)},
        batched=True,
        with_indices=True,
        input_columns=[id_column],
        remove_columns=dataset.column_names,
        desc="Checking ids",
    )
    numbers: npt.NDArray[np.int32] = hashed.with_format("numpy")["example_id"][:].astype(np.int32)
    order = np.argsort(numbers, kind="stable")
    repeats = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
    if repeats.size:
        first, second = order[repeats[0]], order[repeats[0] + 1]
        raise collision(dataset[int(first)][id_column], dataset[int(second)][id_column])
    return numbers

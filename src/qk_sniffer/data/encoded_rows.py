"""The rows of a dataset as tokens, and the batches that a process takes of them."""

from collections.abc import Iterator, Sequence
from copy import copy

import datasets
import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, DistributedSampler

from qk_sniffer.data.batches import Batch
from qk_sniffer.data.texts import Row
from qk_sniffer.data.tokenizing import LISTED, Encode

_TEXTS_TOKENIZED_AT_ONCE = 64


def tokenized(
    parts: Sequence[datasets.Dataset],
    encode: Encode,
    is_left: npt.NDArray[np.bool_],
    num_proc: int | None,
) -> datasets.Dataset:
    """The encoded rows of all parts, whose columns may be of other types in each.

    Args:
        parts: Datasets, one behind the other.
        encode: Turns rows into tokens.
        is_left: (N,) which of all rows are taken.
        num_proc: Processes that tokenize; None uses this one.
    """
    encoded, first = [], 0
    for part in parts:
        rows = np.flatnonzero(is_left[first : first + len(part)])
        of_part = copy(encode)
        if len(parts) > 1 or len(rows) < len(part):
            of_part.row_numbers = first + rows
        encoded.append(
            (part if len(rows) == len(part) else part.select(rows)).map(
                of_part,
                batched=True,
                batch_size=_TEXTS_TOKENIZED_AT_ONCE,
                with_indices=True,
                remove_columns=part.column_names,
                features=encode.features,
                num_proc=num_proc,
                desc="Tokenizing",
            )
        )
        first += len(part)
    # One that was mapped without rows has no columns.
    return datasets.concatenate_datasets([some for some in encoded if len(some)] or encoded[:1])


class EncodedRows(Dataset[list[Row]]):
    """Batches of a tokenized dataset, by the row numbers of their texts."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, batch: Batch) -> list[Row]:
        """The rows of a batch."""
        table = self.dataset[batch]
        lists = [name for name in ("input_ids", *LISTED) if name in table.column_names]
        rows: list[Row] = table.drop_columns(lists).to_pylist()
        for name in lists:
            for row, value in zip(rows, table[name], strict=True):
                row[name] = value.values.to_numpy()
        return rows


class ShareSampler(DistributedSampler[Batch]):
    """The batches of one process; Lightning leaves a distributed sampler as it is."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        # Lightning passes over the hooks of a process without batches, and they are collective.
        return max(1, len(self.batches))


def token_counts(dataset: datasets.Dataset) -> npt.NDArray[np.int64]:
    """Tokens in each text."""
    if len(dataset) == 0:
        # One that was mapped without rows has no columns.
        return np.empty(0, np.int64)
    counts: npt.NDArray[np.int64] = dataset.select_columns("n_tokens")[:]["n_tokens"].to_numpy()
    return counts.astype(np.int64)

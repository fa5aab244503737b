"""Batches of a dataset that is read while the model runs."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from qk_sniffer.batches import WINDOW_BATCHES, padded_tokens, plan_batches, rest_of
from qk_sniffer.errors import UserError
from qk_sniffer.ids import ExampleFilter, are_left, collision, hash_ids
from qk_sniffer.ranks import Dealer
from qk_sniffer.texts import Row, StreamedRows, check_columns
from qk_sniffer.tokenizing import Encode

_RECENT_IDS = 2**16


class StreamedBatches(IterableDataset[list[Row]]):
    """Encoded rows of a stream in the batches that fall to one process.

    Every process, and every worker of its data loader, reads the stream from the start and forms the
    same batches of it, so that rows have their numbers, a shared id is found wherever it is, and
    batches don't depend on the number of processes. Only a process's own texts are tokenized, unless a
    token budget asks for the lengths of all.

    Args:
        rows: The stream.
        encode: Turns rows into tokens.
        batch_size: Most texts in a batch.
        max_tokens_per_batch: Most tokens in a batch, padding included; None for any number.
        filters: Which texts are to be read.
        rank: Number of the process.
        size: How many processes there are.
    """

    def __init__(
        self,
        rows: StreamedRows,
        encode: Encode,
        batch_size: int,
        max_tokens_per_batch: int | None,
        filters: Sequence[ExampleFilter],
        rank: int,
        size: int,
    ) -> None:
        self.rows = rows
        self.encode = encode
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.filters = filters
        self.rank = rank
        self.size = size

    def __iter__(self) -> Iterator[list[Row]]:
        planned = self._in_order() if self.max_tokens_per_batch is None else self._by_length()
        own: Iterator[Callable[[], list[Row]]]
        own = (load for rank, load in planned if rank == self.rank)
        worker = get_worker_info()
        if worker is not None:
            # The data loader asks its workers in turn, which puts the batches into order again.
            own = islice(own, worker.id, None, worker.num_workers)
        for load in own:
            yield load()

    def _in_order(self) -> Iterator[tuple[int, Callable[[], list[Row]]]]:
        """Each batch of adjacent texts: who reads it, and what gives its rows."""
        dealer = Dealer(self.size)
        for rows, is_left in self._windows(self.batch_size):
            if is_left.any():
                left = [row for row, wanted in zip(rows, is_left, strict=True) if wanted]
                yield dealer.deal(1), lambda left=left: self._encoded(left)  # type: ignore[misc]

    def _by_length(self) -> Iterator[tuple[int, Callable[[], list[Row]]]]:
        """The same for batches within a token budget."""
        dealer = Dealer(self.size)
        for rows, is_left in self._windows(WINDOW_BATCHES * self.batch_size):
            if not is_left.any():
                continue
            encoded = self._encoded(rows)
            lengths = np.array([row["n_tokens"] for row in encoded])
            batches = plan_batches(lengths, self.batch_size, self.max_tokens_per_batch)
            for batch in rest_of(batches, is_left):
                chosen = [encoded[i] for i in batch]
                rank = dealer.deal(padded_tokens(batch, lengths))
                yield rank, lambda chosen=chosen: chosen  # type: ignore[misc]

    def _windows(self, size: int) -> Iterator[tuple[list[tuple[int, Row]], npt.NDArray[np.bool_]]]:
        """Adjacent rows with their numbers, and which of them are to be read; ids are checked."""
        stream, seen = iter(self.rows), _SeenIds()
        id_column = self.encode.id_column
        while window := list(islice(stream, size)):
            indices = [index for index, _ in window]
            if indices[0] == 0:
                check_columns(list(window[0][1]), self.encode.text_column, id_column)
            source_ids = indices if id_column is None else [row[id_column] for _, row in window]
            ids = hash_ids(source_ids, indices)
            if id_column is not None:
                for number, source_id in zip(ids, source_ids, strict=True):
                    if not seen.add(number):
                        raise self._collision(number, source_id)
            yield window, are_left(np.array(ids), self.filters)

    def _collision(self, number: int, second: int | str) -> UserError:
        """The error for a shared id; its first row is looked for only now."""
        column = str(self.encode.id_column)
        for index, row in self.rows:
            if hash_ids([row[column]], [index]) == [number]:
                return collision(row[column], second)
        raise RuntimeError(f"the stream had another row with the id {second!r} before")

    def _encoded(self, rows: Sequence[tuple[int, Row]]) -> list[Row]:
        columns = {name: [row[name] for _, row in rows] for name in rows[0][1]}
        encoded = self.encode(columns, [index for index, _ in rows])
        return [
            dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
        ]


class _SeenIds:
    """A set of int32 numbers, of which all but the latest take four bytes each."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.int32)
        self._recent: set[int] = set()

    def add(self, number: int) -> bool:
        """Add a number; False where it was there."""
        place = int(np.searchsorted(self._sorted, number))
        if number in self._recent or self._sorted[place : place + 1].tolist() == [number]:
            return False
        self._recent.add(number)
        if len(self._recent) == _RECENT_IDS:
            recent = np.fromiter(self._recent, np.int32, _RECENT_IDS)
            self._sorted = np.union1d(self._sorted, recent)
            self._recent.clear()
        return True

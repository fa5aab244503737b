"""Batches of a dataset that is read while the model runs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from qk_sniffer.data.batches import Window, padded_tokens, plan_batches, rest_of
from qk_sniffer.data.columns import value_of
from qk_sniffer.data.texts import Row, StreamedRows, check_columns
from qk_sniffer.data.tokenizing import Encode
from qk_sniffer.errors import UserError
from qk_sniffer.ids import ExampleFilter, are_left, collision, hash_ids
from qk_sniffer.processes import Dealer

_RECENT_IDS = 2**16
_ROWS_ENCODED_AT_ONCE = 16

_Planned = tuple[int, Callable[[], list[Row]]]
"""A batch: the process that reads it, and what gives its encoded rows."""


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
        rank: Number of the share of the batches.
        size: How many shares there are.
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
        budget = self.max_tokens_per_batch
        planned = self._in_order() if budget is None else self._by_length(budget)
        own: Iterator[Callable[[], list[Row]]]
        own = (load for rank, load in planned if rank == self.rank)
        worker = get_worker_info()
        if worker is not None:
            # The data loader asks its workers in turn, which puts the batches into order again.
            own = islice(own, worker.id, None, worker.num_workers)
        for load in own:
            yield load()

    def _in_order(self) -> Iterator[_Planned]:
        """Batches of adjacent texts."""
        dealer = Dealer(self.size)
        for rows, is_left in self._checked_rows(self.batch_size):
            if is_left.any():
                left = [row for row, wanted in zip(rows, is_left, strict=True) if wanted]
                yield dealer.deal(1), partial(self._encoded, left)

    def _by_length(self, max_tokens_per_batch: int) -> Iterator[_Planned]:
        """Batches of texts of like length, a window at a time."""
        dealer = Dealer(self.size)
        end = Window(self.batch_size, max_tokens_per_batch)
        window: list[tuple[Row, bool]] = []
        for rows, is_left in self._checked_rows(_ROWS_ENCODED_AT_ONCE):
            for row, wanted in zip(self._encoded(rows), is_left.tolist(), strict=True):
                window.append((row, wanted))
                if end.add(row["n_tokens"] + self.encode.n_new_tokens):
                    yield from self._planned(window, max_tokens_per_batch, dealer)
                    window = []
        yield from self._planned(window, max_tokens_per_batch, dealer)

    def _planned(
        self, window: list[tuple[Row, bool]], max_tokens_per_batch: int, dealer: Dealer
    ) -> Iterator[_Planned]:
        lengths = np.array([row["n_tokens"] for row, _ in window], np.int64)
        lengths += self.encode.n_new_tokens
        batches = plan_batches(lengths, self.batch_size, max_tokens_per_batch)
        for batch in rest_of(batches, np.array([wanted for _, wanted in window], np.bool_)):
            rows = [window[number][0] for number in batch]
            yield dealer.deal(padded_tokens(batch, lengths)), partial(list, rows)

    def _checked_rows(self, size: int) -> Iterator[tuple[list[tuple[int, Row]], npt.NDArray[np.bool_]]]:
        """Some adjacent rows with their numbers, and which of them are to be read; ids are checked."""
        stream, seen = iter(self.rows), _SeenIds()
        id_column = self.encode.id_column
        while rows := list(islice(stream, size)):
            indices = [index for index, _ in rows]
            if indices[0] == 0:
                check_columns(self.rows.columns(rows[0][1]), self.encode.columns)
            source_ids = indices if id_column is None else [value_of(row, id_column) for _, row in rows]
            ids = hash_ids(source_ids, indices)
            if id_column is not None:
                for number, source_id in zip(ids, source_ids, strict=True):
                    if not seen.add(number):
                        raise self._collision(number, source_id)
            yield rows, are_left(np.array(ids), self.filters)

    def _collision(self, number: int, second: int | str) -> UserError:
        """The error for a shared id; its first row is looked for only now."""
        column = str(self.encode.id_column)
        for index, row in self.rows:
            source_id = value_of(row, column)
            if hash_ids([source_id], [index]) == [number]:
                return collision(source_id, second)
        raise RuntimeError(f"the stream had another row with the id {second!r} before")

    def _encoded(self, rows: Sequence[tuple[int, Row]]) -> list[Row]:
        # Rows of another part may lack a column.
        columns = {name: [row.get(name) for _, row in rows] for name in rows[0][1]}
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

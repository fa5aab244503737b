"""The rows that are kept of a batch, drawn on the host before the forward."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture.buffers import upload
from qk_sniffer.capture.heads import Stream
from qk_sniffer.capture.selection import Listed, Selection

Batch = tuple[list[int], list[int]]
"""Example ids and tokens of the sequences of a batch."""

Numbers = npt.NDArray[np.int64]

BATCHES_AT_ONCE, TOKENS_AT_ONCE = 16, 2**16
"""How much is drawn at once: a draw takes the host as long for some rows as for many."""


class Plans:
    """Plans batches one behind the other, and those that are expected some at a time.

    Args:
        streams: The layers and kinds.
        selection: Which positions are kept.
        expected: Example ids and lengths of batches to come; others may come instead.
    """

    def __init__(
        self,
        streams: tuple[Stream, ...],
        selection: Selection,
        expected: Iterable[tuple[Sequence[int], Sequence[int]]],
    ) -> None:
        self._streams, self._selection = streams, selection
        self._expected: Iterator[Batch] = ((list(ids), list(lengths)) for ids, lengths in expected)
        self._drawn: deque[BatchPlan] = deque()

    def next(
        self, example_ids: Sequence[int], lengths: Sequence[int], listed: Listed | None = None
    ) -> "BatchPlan":
        """The rows of the next batch.

        Args:
            example_ids: (B,) one integer for each sequence.
            lengths: (B,) tokens in each sequence.
            listed: Positions to keep of each, where they come with it.
        """
        batch = list(example_ids), list(lengths)
        if listed is not None:
            # No call of the random generator is saved here, so nothing is gained by drawing ahead.
            return next(self._draw([batch], listed))
        if not self._drawn or self._drawn[0].batch != batch:
            self._drawn = deque(self._draw(self._with_following(batch)))
        return self._drawn.popleft()

    def _with_following(self, batch: Batch) -> list[Batch]:
        """A batch, and some of those expected behind it; it alone where another was expected."""
        if next(self._expected, None) != batch:
            self._expected = iter(())
        batches, n_tokens = [batch], _padded_tokens(batch)
        while len(batches) < BATCHES_AT_ONCE and n_tokens < TOKENS_AT_ONCE:
            following = next(self._expected, None)
            if following is None:
                break
            batches.append(following)
            n_tokens += _padded_tokens(following)
        return batches

    def _draw(self, batches: Sequence[Batch], listed: Listed | None = None) -> Iterator["BatchPlan"]:
        lengths = [torch.tensor(lengths, dtype=torch.int64) for _, lengths in batches]
        ids = [torch.tensor(example_ids, dtype=torch.int64) for example_ids, _ in batches]
        n_draws = self._selection.count_draws(self._streams, torch.cat(lengths))
        draws, stream_ids = draws_of(self._selection, self._streams, n_draws)
        sizes = [len(batch_ids) for batch_ids in ids]
        sequences, positions = self._selection.draw(
            torch.cat([stream_ids.repeat_interleave(size) for size in sizes]),
            torch.cat([batch_ids.repeat(n_draws) for batch_ids in ids]),
            torch.cat([batch_lengths.repeat(n_draws) for batch_lengths in lengths]),
            listed,
        )
        batch_indices = torch.cat([torch.arange(size).repeat(n_draws) for size in sizes])[sequences]
        buckets = self._selection.sampler.buckets(positions)
        # Sequences are numbered by batch, draw, and their place in the batch.
        ends = torch.tensor(sizes).repeat_interleave(n_draws).cumsum(0)
        stops = torch.searchsorted(sequences, ends).view(len(batches), n_draws)
        first = 0
        for number, batch in enumerate(batches):
            # Of several processes that share a model one may have no captured head.
            rows = slice(first, first := int(stops[number, -1]) if n_draws else 0)
            yield BatchPlan(
                batch,
                ids[number],
                lengths[number],
                draws,
                positions[rows],
                batch_indices[rows],
                buckets[rows],
                stops[number] - rows.start,
            )


def _padded_tokens(batch: Batch) -> int:
    _, lengths = batch
    return len(lengths) * max(lengths, default=0)


@dataclass(eq=False)
class BatchPlan:
    """The rows that each layer and kind keeps of one batch.

    Those of every draw lie in one tensor, sorted by draw, sequence and position. Each layer and kind
    has a draw of its own, but where nothing is left to chance or they are to keep the same rows: there
    they share one.

    Attributes:
        batch: What it was drawn for.
        example_ids: (B,) int64.
        lengths: (B,) int64, tokens in each sequence.
        draws: The draw of each layer and kind.
        positions: (R,) int64, of each row.
        batch_indices: (R,) int64, its sequence.
        buckets: (R,) int64.
        stops: (n_draws,) the row after the last of each draw.
    """

    batch: Batch
    example_ids: Tensor
    lengths: Tensor
    draws: Mapping[Stream, int]
    positions: Tensor
    batch_indices: Tensor
    buckets: Tensor
    stops: Tensor
    _passage: "Passage | None" = None

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence."""
        return max(self.batch[1], default=0)

    def passage(self, sequences: range, tokens: range) -> "Passage":
        """The rows that one forward reads; every layer of a forward asks for the same."""
        passage = self._passage
        if passage is None or (passage.sequences, passage.tokens) != (sequences, tokens):
            self._passage = passage = Passage(self, sequences, tokens)
        return passage


@lru_cache(maxsize=16)
def draws_of(
    selection: Selection, streams: tuple[Stream, ...], n_draws: int
) -> tuple[Mapping[Stream, int], Tensor]:
    """The draw of each layer and part, and what names the random stream of each draw: (n_draws,)."""
    ids = selection.random_streams(streams)
    numbers = {stream_id: min(number, n_draws - 1) for number, stream_id in enumerate(ids)}
    draws = {stream: numbers[selection.random_stream(*stream)] for stream in streams}
    return draws, torch.tensor(ids[:n_draws], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class KeptQueries:
    """The kept queries of one layer in a forward, on the host.

    Attributes:
        sequences: (N,) their sequences among those of the forward.
        columns: (N,) their places among its tokens.
        positions: (N,) their positions.
        n_before: (N,) places before theirs, from the first of their text on.
        key_positions: (B, P) int64, the positions at all places of cache and forward, -1 for padding;
            None where those of a text follow each other.
    """

    sequences: Numbers
    columns: Numbers
    positions: Numbers
    n_before: Numbers
    key_positions: Tensor | None = None

    def ordered(self, order: Numbers) -> "KeptQueries":
        """The same in another order."""
        return KeptQueries(
            self.sequences[order],
            self.columns[order],
            self.positions[order],
            self.n_before[order],
            self.key_positions,
        )


class KeptRows(ABC):
    """The rows that each layer and kind keeps of one forward, sorted by draw.

    Attributes:
        draws: The draw of each layer and kind.
        stops: The row after the last of each draw.
        sizes: Rows of each draw.
    """

    def __init__(self, draws: Mapping[Stream, int], stops: list[int]) -> None:
        self.draws, self.stops = draws, stops
        self.sizes: list[int] = np.diff(stops, prepend=0).tolist()
        self._steps: dict[tuple[torch.device, int, int], Sequence[Tensor]] = {}
        self._steps_on_host: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    @abstractmethod
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where the rows of all draws lie in the states: (K,) int64 sequence and token each."""

    @abstractmethod
    def queries(self, stream: Stream) -> KeptQueries:
        """The kept queries of a layer."""

    def rows_of(self, stream: Stream) -> slice:
        """Where the rows of a layer and part are among those of all draws."""
        draw = self.draws[stream]
        return slice(self.stops[draw] - self.sizes[draw], self.stops[draw])

    def steps_on_host(self, per_sequence: int, per_token: int) -> npt.NDArray[np.int64]:
        """Where the rows of all draws lie in states of the forward: (K,) int64.

        Args:
            per_sequence: Steps from one sequence to the next.
            per_token: Steps from one token to the next.
        """
        key = per_sequence, per_token
        if key not in self._steps_on_host:
            rows, tokens = self._places()
            self._steps_on_host[key] = (rows * per_sequence + tokens * per_token).numpy()
        return self._steps_on_host[key]

    def steps(self, device: torch.device, per_sequence: int, per_token: int) -> Sequence[Tensor]:
        """The same on a device, for each draw."""
        key = device, per_sequence, per_token
        if key not in self._steps:
            steps = torch.from_numpy(self.steps_on_host(per_sequence, per_token))
            self._steps[key] = torch.split(upload(steps, device), self.sizes)
        return self._steps[key]

    def forget_steps(self) -> None:
        """Let go of what only a forward needs."""
        self._steps.clear()
        self._steps_on_host.clear()

    def _by_draw(self, columns: Sequence[Tensor]) -> Tensor:
        """Three columns of the rows, int32: those of a draw begin at three times its first row."""
        sizes, stops = np.array(self.sizes), np.array(self.stops)
        n_rows = columns[0].numel()
        # Row i of a draw of n rows, the first of them number s, goes to 3 s + column n + (i - s).
        places = np.arange(n_rows) + 2 * np.repeat(stops - sizes, sizes)
        strides = np.repeat(sizes, sizes)
        numbers = np.empty(3 * n_rows, np.int32)
        for number, column in enumerate(columns):
            numbers[places + number * strides] = column.numpy()
        return torch.from_numpy(numbers)


class Passage(KeptRows):
    """The rows of a batch in some of its sequences and positions.

    Args:
        plan: The batch's.
        sequences: Some of its sequences.
        tokens: Some positions.
    """

    def __init__(self, plan: BatchPlan, sequences: range, tokens: range) -> None:
        self.sequences, self.tokens = sequences, tokens
        self._plan = plan
        self._rows: Tensor | slice = slice(None)
        stops = plan.stops
        if (sequences, tokens.start) != (range(len(plan.lengths)), 0) or tokens.stop < plan.longest:
            inside = (plan.positions >= tokens.start) & (plan.positions < tokens.stop)
            inside &= plan.batch_indices >= sequences.start
            inside &= plan.batch_indices < sequences.stop
            self._rows = inside.nonzero().squeeze(1)
            stops = torch.searchsorted(self._rows, stops)
        super().__init__(plan.draws, stops.tolist())

    def _sequences_and_positions(self) -> tuple[Tensor, Tensor]:
        """Those of its rows: (K,) int64 each."""
        return self._plan.batch_indices[self._rows], self._plan.positions[self._rows]

    def _places(self) -> tuple[Tensor, Tensor]:
        sequences, positions = self._sequences_and_positions()
        return sequences - self.sequences.start, positions - self.tokens.start

    def queries(self, stream: Stream) -> KeptQueries:
        """The kept queries of a layer, whose texts begin at the first place of their sequences."""
        rows = self.rows_of(stream)
        sequences, positions = (part[rows].numpy() for part in self._sequences_and_positions())
        return KeptQueries(
            sequences - self.sequences.start, positions - self.tokens.start, positions, positions
        )

    def sizes_within(self, lengths: Tensor) -> list[int]:
        """Rows of each draw that come before the end of their sequence.

        Args:
            lengths: (B,) tokens that each sequence has in the end.
        """
        sequences, positions = self._sequences_and_positions()
        live = np.concatenate([[0], (positions < lengths[sequences]).numpy().cumsum()])
        sizes: list[int] = np.diff(live[self.stops], prepend=0).tolist()
        return sizes

    def numbers(self, lengths: Tensor) -> Tensor:
        """Example id, position and bucket of each row: (3 K,) int32.

        Those of a draw, (3, its rows), begin at three times its first row.

        Args:
            lengths: (B,) tokens that each sequence has in the end; rows behind have the position -1.
        """
        sequences, positions = self._sequences_and_positions()
        live = torch.where(positions < lengths[sequences], positions, -1)
        return self._by_draw([self._plan.example_ids[sequences], live, self._plan.buckets[self._rows]])

"""The sniffer: receives each layer's queries and keys, keeps the sampled rows, hands them on.

Everything that decides which rows are kept is known on the host before the forward, so a capture
inside the forward is one upload of places for the batch, and for each layer and kind one gather into a
buffer. A buffer is handed on when it is full, in the middle of a batch or of a layer; nothing here
waits for a device.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qk_sniffer.capture.buffers import Staging
from qk_sniffer.capture.gathers import Gather, Gathers, result_states
from qk_sniffer.capture.heads import CapturedStream, Stream
from qk_sniffer.capture.moments import MomentSums
from qk_sniffer.capture.plan import BatchPlan, Passage, Plans
from qk_sniffer.capture.positions import own_keys
from qk_sniffer.capture.rows import BatchRows, Block, Sink
from qk_sniffer.capture.selection import Listed, Selection
from qk_sniffer.capture.softmax import SoftmaxInput, SoftmaxStatistics
from qk_sniffer.kinds import LOCAL_POSITIONS, Kind, Part


class _PendingChunk(NamedTuple):
    """Gathered rows of one layer and kind in one attention call."""

    passage: Passage
    stream: Stream
    sliding_window: int | None
    gather: Gather

    def block(self, first: int) -> Block:
        """What they are.

        Args:
            first: Where the numbers of the passage begin.
        """
        return self.gather.block(self.stream, self.sliding_window, first)


class _EndedBatch(NamedTuple):
    """A batch whose rows have not been handed on.

    What they are is worked out for many batches at once, which takes half the time that it would take
    behind each forward.
    """

    example_ids: Tensor
    """(B,) int64."""
    lengths: Tensor
    """(B,) int64, tokens that each sequence has in the end."""
    pending: list[_PendingChunk]


class CapturesAttention(Protocol):
    """What an attention layer hands its queries and keys to."""

    pre_rope: bool
    """Whether it wants them as they are before the rotary embedding."""

    both_stages: bool = False
    """Whether it wants those of the other side of the rotary embedding too."""

    @property
    def parts(self) -> Collection[Part]:
        """What it wants of a call."""
        return ()

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        sliding_window: int | None = None,
        softmax: SoftmaxInput | None = None,
    ) -> None:
        """Take one attention call; the arguments are those of ``Sniffer.capture``."""

    def capture_other_stage(self, layer_idx: int, query: Tensor, key: Tensor) -> None:
        """Take the vectors of the other side of the rotary embedding, where they are wanted."""
        return None

    def capture_result(
        self,
        layer_idx: int,
        value: Tensor | None,
        output: Tensor | None,
        sliding_window: int | None = None,
    ) -> None:
        """Take the values and outputs of a call, where they are wanted; see ``Sniffer``."""
        return None


class Sniffer:
    """Keeps a deterministic sample of every captured head's queries and keys.

    For each batch call ``begin_batch``, run the model, in which every attention layer calls
    ``capture``, and call ``flush_batch``. The model may read the batch in one forward or, with a
    cache, in several: passages of a prompt, or tokens that it generates.

    Args:
        streams: The captured heads of each layer and part, in the order in which the model calls them.
        selection: Which positions are kept.
        sink: Takes the rows that are kept.
        local_positions: Positions that the statistic local_prob counts.
        pre_rope: Ask for the vectors as they are before the rotary embedding.
        expected: Example ids and lengths of batches to come, which are then drawn some at a time;
            others may come instead.
        moments: Sums those of every token, kept or not.
    """

    def __init__(
        self,
        streams: Iterable[CapturedStream],
        selection: Selection,
        sink: Sink,
        *,
        local_positions: int = LOCAL_POSITIONS,
        pre_rope: bool = False,
        expected: Iterable[tuple[Sequence[int], Sequence[int]]] = (),
        moments: MomentSums | None = None,
    ) -> None:
        self.pre_rope = pre_rope
        self.both_stages = moments is not None and (pre_rope or moments.pre_rope)
        self._moments = moments
        self._to_read: list[int] = []
        streams = list(streams)
        self._heads = {stream.key: stream.heads for stream in streams}
        self.parts = frozenset(stream.kind for stream in streams)
        self._plans = Plans(tuple(self._heads), selection, expected)
        self._sink = sink
        self._staging = Staging(sink.take_vectors)
        statistics = SoftmaxStatistics(streams, local_positions)
        self._gathers = Gathers(self._heads, self._staging, statistics)
        self._ended: list[_EndedBatch] = []
        self._plan: BatchPlan | None = None
        self._passage: Passage | None = None
        self._positions: Tensor | None = None
        self._pending: list[_PendingChunk] = []
        self._sequences = range(0)
        self._tokens_read: dict[int, list[int]] = {}
        self._has_results = bool({"v", "o"} & self.parts)
        self._results_read: dict[int, list[int]] = {}
        self.rows_kept = 0
        """Rows flushed so far, over all heads."""

    def begin_batch(
        self,
        example_ids: Sequence[int],
        sequence_lengths: Sequence[int],
        listed: Listed | None = None,
        counted_lengths: Sequence[int] | None = None,
    ) -> None:
        """Draw the rows of a batch.

        Args:
            example_ids: One integer for each sequence.
            sequence_lengths: Its number of tokens; where the model generates, the most there can be.
            listed: Positions to keep of each, where they come with it.
            counted_lengths: Tokens of each whose moments are summed; None sums those of all that rows
                are drawn from.
        """
        self.close()
        self._plan = self._plans.next(example_ids, sequence_lengths, listed)
        counted = sequence_lengths if counted_lengths is None else counted_lengths
        self._to_read = list(map(max, sequence_lengths, counted))
        if self._moments is not None:
            self._moments.begin_batch(counted)
        self._sequences = range(len(sequence_lengths))
        self._tokens_read = {layer_idx: [0] * len(sequence_lengths) for layer_idx, _ in self._heads}
        if self._has_results:
            self._results_read = {
                layer_idx: list(read) for layer_idx, read in self._tokens_read.items()
            }

    def read_part(self, start: int, stop: int) -> None:
        """Let the next forwards read some sequences of the batch alone, and from their first token.

        What was captured of them before, in a forward that could not be finished, is forgotten.

        Args:
            start: The first of them, by its index in the batch.
            stop: The one after the last.
        """
        self._sequences, self._passage = range(start, stop), None
        if self._moments is not None:
            self._moments.begin_part(self._sequences)
        for read in (*self._tokens_read.values(), *self._results_read.values()):
            read[start:stop] = [0] * (stop - start)
        self._pending = [
            chunk
            for chunk in self._pending
            if chunk.passage.sequences.stop <= start or chunk.passage.sequences.start >= stop
        ]

    @property
    def has_captured(self) -> bool:
        """Whether a layer has handed over tokens of this batch."""
        return any(any(read) for read in self._tokens_read.values())

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        sliding_window: int | None = None,
        softmax: SoftmaxInput | None = None,
    ) -> None:
        """Gather the kept rows of one attention call; enqueues work and waits for nothing.

        Args:
            layer_idx: Layer in the text decoder.
            query: (B, num_attention_heads, Q, head_dim).
            key: (B, num_key_value_heads, K, head_dim), where K > Q if a cache holds other tokens, as
                in ``compute_positions``; keys of earlier tokens were captured by an earlier call.
            positions: (Q,) absolute positions of the queries, consecutive, int64 on the CPU.
            sliding_window: The layer's window; None for full attention.
            softmax: What its softmax takes, where its statistics are wanted.

        Raises:
            RuntimeError: No batch has begun, or the tokens don't follow those that the layer's last
                call had.
        """
        if self._plan is None:
            raise RuntimeError("begin_batch must come before the forward that is captured")
        read = self._tokens_read.get(layer_idx)
        if read is None:
            return
        passage = self._passage_at(positions)
        if read[passage.sequences.start] != passage.tokens.start:
            # The very same tensor may have other values than before.
            self._passage = None
            passage = self._passage_at(positions)
        sequences, tokens, length = passage.sequences, passage.tokens, query.shape[2]
        if read[sequences.start] != tokens.start or not len(tokens) == positions.numel() == length:
            raise RuntimeError(
                f"layer {layer_idx}: {length} queries at positions {tokens.start} to "
                f"{tokens.stop - 1} came after {read[sequences.start]} tokens of the same batch"
            )
        read[sequences.start : sequences.stop] = [tokens.stop] * len(sequences)
        key = own_keys(key, tokens.start, length)
        states: dict[Kind, Tensor] = {"q": query, "k": key}
        if self._moments is not None:
            self._moments.add(layer_idx, states, sequences, tokens, pre_rope=self.pre_rope)
        for stream, gather in self._gathers.gather_call(layer_idx, states, passage, softmax):
            self._pending.append(_PendingChunk(passage, stream, sliding_window, gather))

    def capture_other_stage(self, layer_idx: int, query: Tensor, key: Tensor) -> None:
        """Sum the moments of the other stage of the attention call that the layer has captured.

        Args:
            layer_idx: Layer in the text decoder.
            query: (B, num_attention_heads, Q, head_dim), before the rotary embedding where ``capture``
                took them behind it, and the other way round.
            key: (B, num_key_value_heads, Q, head_dim), those of the queries' tokens.
        """
        passage = self._passage
        if self._moments is None or passage is None:
            return
        states: dict[Kind, Tensor] = {"q": query, "k": key}
        self._moments.add(
            layer_idx, states, passage.sequences, passage.tokens, pre_rope=not self.pre_rope
        )

    def capture_result(
        self,
        layer_idx: int,
        value: Tensor | None,
        output: Tensor | None,
        sliding_window: int | None = None,
    ) -> None:
        """Gather the kept values and outputs of the attention call that the layer has captured.

        Args:
            layer_idx: Layer in the text decoder.
            value: (B, num_key_value_heads, K, value_head_dim), as the keys of the call; None for none.
            output: (B, Q, num_attention_heads, value_head_dim), before the output projection; None for
                none.
            sliding_window: The layer's window; None for full attention.
        """
        read, passage = self._results_read.get(layer_idx), self._passage
        if read is None:
            return
        assert passage is not None
        states = result_states(value, output, passage.tokens.start, len(passage.tokens))
        if self._moments is not None:
            self._moments.add(layer_idx, states, passage.sequences, passage.tokens)
        for stream, gather in self._gathers.gather_call(layer_idx, states, passage):
            self._pending.append(_PendingChunk(passage, stream, sliding_window, gather))
        read[passage.sequences.start : passage.sequences.stop] = [passage.tokens.stop] * len(
            passage.sequences
        )

    def _passage_at(self, positions: Tensor) -> Passage:
        """The rows that a forward reads, whose layers mostly give the very same positions."""
        if positions is not self._positions or self._passage is None:
            assert self._plan is not None
            tokens = range(int(positions[0]), int(positions[-1]) + 1)
            self._positions, self._passage = positions, self._plan.passage(self._sequences, tokens)
        return self._passage

    def flush_batch(
        self, sequence_lengths: Sequence[int] | None = None, *, hand_on: bool = True
    ) -> None:
        """End the batch.

        Args:
            sequence_lengths: Tokens that each sequence has in the end, where they are fewer than
                ``begin_batch`` was told.
            hand_on: Hand its rows to the sink; otherwise they wait for those of another batch.

        Raises:
            RuntimeError: No batch has begun, or a layer did not see all of its tokens.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("begin_batch must come before flush_batch")
        lengths = plan.lengths
        if sequence_lengths is not None:
            lengths = torch.as_tensor(sequence_lengths, dtype=torch.int64)
        self._require_read(self._to_read if sequence_lengths is None else lengths.tolist())
        self.rows_kept += self._count(None if sequence_lengths is None else lengths)
        for passage in {chunk.passage for chunk in self._pending}:
            passage.forget_steps()
        self._ended.append(_EndedBatch(plan.example_ids, lengths, self._pending))
        if self._moments is not None:
            self._moments.end_batch()
        self._end_batch()
        if hand_on:
            self.hand_on()

    def _count(self, lengths: Tensor | None) -> int:
        """Rows of the batch, over all heads, within the lengths that its sequences have in the end."""
        # The statistics are columns of other rows.
        pending = [chunk for chunk in self._pending if chunk.stream[1] != "softmax"]
        if lengths is None:
            return sum(chunk.gather.n_vectors for chunk in pending)
        rows = 0
        for passage, chunks in groupby(pending, key=attrgetter("passage")):
            sizes = passage.sizes_within(lengths)
            rows += sum(c.gather.n_heads * sizes[passage.draws[c.stream]] for c in chunks)
        return rows

    def _require_read(self, lengths: list[int]) -> None:
        """See that every layer has read all tokens of the batch."""
        for layer_idx, read in (*self._tokens_read.items(), *self._results_read.items()):
            if read == lengths:
                continue
            for tokens_read, length in zip(read, lengths, strict=True):
                if tokens_read < length:
                    raise RuntimeError(
                        f"layer {layer_idx} was captured for {tokens_read} of {length} tokens"
                    )

    def hand_on(self) -> None:
        """Hand the rows of the batches that have ended to the sink, without waiting for them."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        blocks: list[Block] = []
        numbers, n_numbers = [torch.empty(0, dtype=torch.int32)], 0
        for batch in ended:
            for passage, chunks in groupby(batch.pending, key=attrgetter("passage")):
                blocks += [chunk.block(n_numbers) for chunk in chunks]
                numbers.append(passage.numbers(batch.lengths))
                n_numbers += numbers[-1].numel()
        example_ids = torch.cat([batch.example_ids for batch in ended])
        self._staging.end()
        self._sink.take_rows(BatchRows(example_ids, blocks, torch.cat(numbers)))

    def _end_batch(self) -> None:
        self._plan = self._passage = self._positions = None
        self._pending = []
        self._tokens_read, self._results_read = {}, {}

    def close(self) -> None:
        """Drop what a batch that was never flushed left behind."""
        self._end_batch()
        if not self._ended:
            self._staging.clear()


_active_sniffer: CapturesAttention | None = None


def get_active_sniffer() -> CapturesAttention | None:
    """What the attention layers of the forward that is running report to, or None."""
    return _active_sniffer


@contextmanager
def active_sniffer(sniffer: CapturesAttention) -> Iterator[None]:
    """Make ``sniffer`` the one that attention layers find, for the length of a block."""
    global _active_sniffer
    previous, _active_sniffer = _active_sniffer, sniffer
    try:
        yield
    finally:
        _active_sniffer = previous

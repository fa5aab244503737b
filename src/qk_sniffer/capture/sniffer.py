"""The sniffer: receives each layer's queries and keys, keeps the sampled rows, hands them on.

Everything that decides which rows are kept is known on the host before the forward, so a capture
inside the forward is one upload of places for the batch, and for each layer and kind one gather into a
buffer. A buffer is handed on when it is full, in the middle of a batch or of a layer; nothing here
waits for a device.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qk_sniffer.capture.buffers import Staging, upload
from qk_sniffer.capture.heads import CapturedHeads
from qk_sniffer.capture.plan import BatchPlan, Kind, Passage
from qk_sniffer.capture.positions import first_new_key
from qk_sniffer.capture.rows import Block, FinishedRows, Sink
from qk_sniffer.capture.sampling import Sampler


class _PendingChunk(NamedTuple):
    """Gathered rows of one layer and kind in one attention call.

    Attributes:
        passage: Which rows of the batch the call has read.
        block: What they are; its ``rows`` count from the numbers of the passage.
    """

    passage: Passage
    block: Block


class CapturesAttention(Protocol):
    """What an attention layer hands its queries and keys to."""

    pre_rope: bool
    """Whether it wants them as they are before the rotary embedding."""

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        sliding_window: int | None = None,
    ) -> None:
        """Take one attention call; the arguments are those of ``Sniffer.capture``."""


class Sniffer:
    """Keeps a deterministic sample of every captured head's queries and keys.

    For each batch call ``begin_batch``, run the model, in which every attention layer calls
    ``capture``, and call ``flush_batch``. The model may read the batch in one forward or, with a
    cache, in several: passages of a prompt, or tokens that it generates.

    Args:
        heads: The captured heads by layer.
        sampler: Which positions are kept.
        seed: 64-bit seed of the random stream.
        sink: Takes the rows that are kept.
        capture_queries: Keep the queries.
        capture_keys: Keep the keys.
        pre_rope: Ask for the vectors as they are before the rotary embedding.
    """

    def __init__(
        self,
        heads: Mapping[int, CapturedHeads],
        sampler: Sampler,
        seed: int,
        sink: Sink,
        *,
        capture_queries: bool = True,
        capture_keys: bool = True,
        pre_rope: bool = False,
    ) -> None:
        self.pre_rope = pre_rope
        self._heads: dict[tuple[int, Kind], tuple[int, ...]] = {}
        for layer_idx, captured in heads.items():
            if capture_queries:
                self._heads[layer_idx, "q"] = captured.query
            if capture_keys:
                self._heads[layer_idx, "k"] = captured.key
        self._sampler = sampler
        self._seed = seed
        self._sink = sink
        self._staging = Staging(sink.take_vectors)
        self._finished = FinishedRows()
        self._plan: BatchPlan | None = None
        self._pending: list[_PendingChunk] = []
        self._sequences = range(0)
        self._tokens_read: dict[int, list[int]] = {}
        self._head_steps: dict[tuple[torch.device, tuple[int, ...], int], Tensor] = {}
        self.rows_kept = 0
        """Rows flushed so far, over all heads."""

    def begin_batch(self, example_ids: Sequence[int], sequence_lengths: Sequence[int]) -> None:
        """Draw the rows of a batch.

        Args:
            example_ids: One integer for each sequence.
            sequence_lengths: Its number of tokens; where the model generates, the most there can be.
        """
        self.close()
        self._plan = BatchPlan(
            list(self._heads),
            torch.as_tensor(example_ids, dtype=torch.int64),
            torch.as_tensor(sequence_lengths, dtype=torch.int64),
            self._sampler,
            self._seed,
        )
        self._sequences = range(len(sequence_lengths))
        self._tokens_read = {layer_idx: [0] * len(sequence_lengths) for layer_idx, _ in self._heads}

    def read_part(self, start: int, stop: int) -> None:
        """Let the next forwards read some sequences of the batch alone, and from their first token.

        What was captured of them before, in a forward that could not be finished, is forgotten.

        Args:
            start: The first of them, by its index in the batch.
            stop: The one after the last.
        """
        self._sequences = range(start, stop)
        for read in self._tokens_read.values():
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
    ) -> None:
        """Gather the kept rows of one attention call; enqueues work and waits for nothing.

        Args:
            layer_idx: Layer in the text decoder.
            query: (B, num_attention_heads, Q, head_dim).
            key: (B, num_key_value_heads, K, head_dim), where K > Q if a cache holds other tokens, as
                in ``compute_positions``; keys of earlier tokens were captured by an earlier call.
            positions: (Q,) absolute positions of the queries, consecutive, int64 on the CPU.
            sliding_window: The layer's window; None for full attention.

        Raises:
            RuntimeError: No batch has begun, or the tokens don't follow those that the layer's last
                call had.
        """
        if self._plan is None:
            raise RuntimeError("begin_batch must come before the forward that is captured")
        if layer_idx not in self._tokens_read:
            return
        length, start, stop = positions.numel(), int(positions[0]), int(positions[-1]) + 1
        sequences, read = self._sequences, self._tokens_read[layer_idx]
        tokens_read = read[sequences.start]
        if start != tokens_read or stop - start != length or query.shape[2] != length:
            raise RuntimeError(
                f"layer {layer_idx}: {query.shape[2]} queries at positions {start} to {stop - 1} came "
                f"after {tokens_read} tokens of the same batch"
            )
        read[sequences.start : sequences.stop] = [stop] * len(sequences)
        passage = self._plan.passage(sequences, range(start, stop))
        if key.shape[2] != length:
            new_keys = first_new_key(start, length, key.shape[2])
            key = key[:, :, new_keys : new_keys + length]
        states: tuple[tuple[Kind, Tensor], ...] = (("q", query), ("k", key))
        for kind, vectors in states:
            if (layer_idx, kind) in self._heads:
                plain = vectors.detach() if vectors.requires_grad else vectors
                self._gather((layer_idx, kind), plain, passage, sliding_window)

    def _gather(
        self,
        stream: tuple[int, Kind],
        states: Tensor,
        passage: Passage,
        sliding_window: int | None,
    ) -> None:
        """Lay down the kept rows of all captured heads, head by head."""
        assert self._plan is not None
        draw = self._plan.draws[stream]
        n_rows, width = passage.sizes[draw], states.shape[3]
        if n_rows == 0:
            return
        vectors, (per_sequence, per_head, per_token) = _as_rows(states)
        steps = passage.steps(states.device, per_sequence, per_token)[draw]
        head_steps = self._steps_to_heads(states.device, self._heads[stream], per_head)
        block = Block(
            *stream,
            sliding_window,
            _dtype_name(states.dtype),
            len(head_steps),
            n_rows,
            width,
            self._staging.align(),
            3 * (passage.stops[draw] - n_rows),
        )
        done, total = 0, block.n_heads * n_rows
        while done < total:
            room = self._staging.room(states.device, states.dtype, total - done, width)
            stop, first = done + room.shape[0], done // n_rows
            if stop - done < total:
                index = (head_steps[first : -(-stop // n_rows)] + steps).view(-1)
                index = index[done - first * n_rows : stop - first * n_rows]
            else:
                index = (head_steps + steps).view(-1)
            torch.index_select(vectors, 0, index, out=room)
            done = stop
        self._pending.append(_PendingChunk(passage, block))

    def _steps_to_heads(self, device: torch.device, heads: tuple[int, ...], per_head: int) -> Tensor:
        """(n_heads, 1) int64 on ``device``."""
        key = device, heads, per_head
        if key not in self._head_steps:
            self._head_steps[key] = upload(per_head * torch.tensor(heads)[:, None], device)
        return self._head_steps[key]

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
        self._require_read(lengths.tolist())
        self._finished.add_batch(plan.example_ids)
        for passage, chunks in groupby(self._pending, key=attrgetter("passage")):
            blocks, numbers = [chunk.block for chunk in chunks], passage.numbers(lengths)
            self._finished.add_rows(blocks, numbers)
            for block in blocks:
                live = block.n_rows
                if sequence_lengths is not None:
                    live = int((block.part_of(numbers)[1] >= 0).sum())
                self.rows_kept += block.n_heads * live
        self._end_batch()
        if hand_on:
            self.hand_on()

    def _require_read(self, lengths: list[int]) -> None:
        """See that every layer has read all tokens of the batch."""
        for layer_idx, read in self._tokens_read.items():
            if read == lengths:
                continue
            for tokens_read, length in zip(read, lengths, strict=True):
                if tokens_read < length:
                    raise RuntimeError(
                        f"layer {layer_idx} was captured for {tokens_read} of {length} tokens"
                    )

    def hand_on(self) -> None:
        """Hand the rows of the batches that have ended to the sink, without waiting for them."""
        if self._finished:
            finished, self._finished = self._finished, FinishedRows()
            self._staging.end()
            self._sink.take_rows(finished.joined())

    def _end_batch(self) -> None:
        self._plan = None
        self._pending = []
        self._tokens_read = {}

    def close(self) -> None:
        """Drop what a batch that was never flushed left behind."""
        self._end_batch()
        if not self._finished:
            self._staging.clear()


def _as_rows(states: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Every vector of some states as a row of one matrix, without a copy.

    Args:
        states: (B, n_heads, S, head_dim).

    Returns:
        The matrix, and the rows from one sequence, head and token to the next.
    """
    if states.stride(3) != 1:
        states = states.contiguous()
    size, step, steps = _row_steps(states.shape, states.stride())
    return states.as_strided((size, states.shape[3]), (step, 1)), steps


@lru_cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=64)
def _row_steps(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[int, int, tuple[int, int, int]]:
    """Rows of the matrix, elements from one to the next, and rows along each axis but the last."""
    walked = [stride if size > 1 else 0 for stride, size in zip(strides[:3], shape[:3], strict=True)]
    step = math.gcd(*walked) or 1
    per_sequence, per_head, per_token = (stride // step for stride in walked)
    last = (shape[0] - 1) * per_sequence + (shape[1] - 1) * per_head + (shape[2] - 1) * per_token
    return last + 1, step, (per_sequence, per_head, per_token)


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

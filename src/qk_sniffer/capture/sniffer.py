"""The sniffer: receives each layer's queries and keys, keeps the sampled rows, hands them on.

Everything that decides which rows are kept is known on the host before the forward, so a capture
inside the forward is one upload of indices for the batch, and for each layer and kind one gather and
the start of one copy to the host. Nothing here waits for a device, except ``Chunk.vectors``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from qk_sniffer.capture.heads import CapturedHeads
from qk_sniffer.capture.positions import first_new_key
from qk_sniffer.capture.sampling import Sampler, draw_positions
from qk_sniffer.capture.transfer import HostCopies, HostCopy, upload

Kind = Literal["q", "k"]


@dataclass(frozen=True)
class Chunk:
    """The kept rows of one layer and kind from one batch.

    K rows are sorted by their place in the batch and by position.

    Attributes:
        layer_idx: Layer in the text decoder, from 0.
        kind: "q" or "k".
        copies: The vectors as each attention call of the batch gave them, on their way to the host.
        order: Which of their rows are kept, in order; None keeps all as they are.
        numbers: (3, K) int32: example id, absolute position and bucket of each row.
        sliding_window: The window that the layer used; None attends to all earlier tokens.
    """

    layer_idx: int
    kind: Kind
    copies: Sequence[HostCopy]
    order: Tensor | None
    numbers: Tensor
    sliding_window: int | None

    @property
    def example_ids(self) -> Tensor:
        """(K,) int32."""
        return self.numbers[0]

    @property
    def positions(self) -> Tensor:
        """(K,) int32, absolute."""
        return self.numbers[1]

    @property
    def buckets(self) -> Tensor:
        """(K,) int32."""
        return self.numbers[2]

    @property
    def vectors(self) -> Tensor:
        """(n_heads, K, head_dim) in the dtype of the model; waits until they are on the host."""
        parts = [copy.wait() for copy in self.copies]
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return vectors if self.order is None else vectors[:, self.order]

    @property
    def n_bytes(self) -> int:
        """Memory of the vectors."""
        return sum(copy.tensor.nbytes for copy in self.copies)


@dataclass(frozen=True)
class _PendingChunk:
    """Gathered rows of one attention call over some sequences of the batch."""

    sequences: range
    copy: HostCopy
    rows: Tensor
    sliding_window: int | None


class _BatchPlan:
    """The rows that each layer and kind keeps of one batch, drawn before the forward.

    Rows of every layer and kind lie in one tensor, sorted by stream, sequence and position.
    """

    def __init__(
        self,
        streams: Sequence[tuple[int, Kind]],
        example_ids: Tensor,
        lengths: Tensor,
        sampler: Sampler,
        seed: int,
    ) -> None:
        batch_size = lengths.numel()
        stream_ids = torch.tensor([2 * layer_idx + (kind == "k") for layer_idx, kind in streams])
        sequences, positions = draw_positions(
            sampler,
            seed,
            stream_ids.repeat_interleave(batch_size),
            example_ids.repeat(len(streams)),
            lengths.repeat(len(streams)),
        )
        self.lengths = lengths
        self.positions = positions
        self.batch_indices = sequences % batch_size
        ids = example_ids[self.batch_indices]
        self.numbers = torch.stack([ids, positions, sampler.buckets(positions)]).to(torch.int32)
        self.streams = {stream: i for i, stream in enumerate(streams)}
        self.ends = torch.bincount(sequences // batch_size, minlength=len(streams)).cumsum(0)
        self._passage: _Passage | None = None

    def passage(self, sequences: range, tokens: range) -> "_Passage":
        """The rows that one forward reads; every layer of a forward asks for the same."""
        passage = self._passage
        if passage is None or (passage.sequences, passage.tokens) != (sequences, tokens):
            self._passage = passage = _Passage(self, sequences, tokens)
        return passage


class _Passage:
    """The rows of a batch in some of its sequences and positions, uploaded once for all layers."""

    def __init__(self, plan: _BatchPlan, sequences: range, tokens: range) -> None:
        self.sequences, self.tokens = sequences, tokens
        inside = (plan.positions >= tokens.start) & (plan.positions < tokens.stop)
        inside &= plan.batch_indices >= sequences.start
        inside &= plan.batch_indices < sequences.stop
        self._rows = inside.nonzero().squeeze(1)
        indices = torch.stack([plan.batch_indices - sequences.start, plan.positions - tokens.start])
        self._indices = indices[:, self._rows]
        ends = torch.searchsorted(self._rows, plan.ends).tolist()
        self._slices = {
            stream: slice(ends[i - 1] if i else 0, ends[i]) for stream, i in plan.streams.items()
        }
        self._on_device: dict[torch.device, Tensor] = {}

    def rows(self, stream: tuple[int, Kind]) -> Tensor:
        """(K,) int64 indices of a stream's rows among those of the batch, on the host."""
        return self._rows[self._slices[stream]]

    def indices(self, stream: tuple[int, Kind], device: torch.device) -> Tensor:
        """(2, K) int64 on ``device``: index into the batch, and into the tokens of the forward."""
        if device not in self._on_device:
            self._on_device[device] = upload(self._indices, device)
        return self._on_device[device][:, self._slices[stream]]


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
        sink: Called with every chunk when a batch is flushed; the chunk's vectors may still be on their
            way to the host.
        capture_queries: Keep the queries.
        capture_keys: Keep the keys.
        pre_rope: Ask for the vectors as they are before the rotary embedding.
    """

    def __init__(
        self,
        heads: Mapping[int, CapturedHeads],
        sampler: Sampler,
        seed: int,
        sink: Callable[[Chunk], None],
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
        self._plan: _BatchPlan | None = None
        self._pending: dict[tuple[int, Kind], list[_PendingChunk]] = {}
        self._sequences = range(0)
        self._tokens_read: dict[int, list[int]] = {}
        self._head_indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._host_copies = HostCopies()
        self.rows_kept = 0
        """Rows flushed so far, over all heads."""

    def begin_batch(self, example_ids: Sequence[int], sequence_lengths: Sequence[int]) -> None:
        """Draw the rows of a batch.

        Args:
            example_ids: One integer for each sequence.
            sequence_lengths: Its number of tokens; where the model generates, the most there can be.
        """
        self.close()
        self._plan = _BatchPlan(
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
        for stream, chunks in self._pending.items():
            self._pending[stream] = [
                chunk
                for chunk in chunks
                if chunk.sequences.stop <= start or chunk.sequences.start >= stop
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
        new_keys = first_new_key(start, length, key.shape[2])
        key = key[:, :, new_keys : new_keys + length]
        states: tuple[tuple[Kind, Tensor], ...] = (("q", query), ("k", key))
        for kind, vectors in states:
            stream = layer_idx, kind
            if stream in self._heads and (rows := passage.rows(stream)).numel():
                kept = self._gather(stream, vectors, passage.indices(stream, vectors.device))
                copy = self._host_copies.start(kept)
                chunk = _PendingChunk(sequences, copy, rows, sliding_window)
                self._pending.setdefault(stream, []).append(chunk)

    def _gather(self, stream: tuple[int, Kind], states: Tensor, indices: Tensor) -> Tensor:
        """The kept rows of all captured heads in one gather: (n_heads, K, head_dim)."""
        heads = self._heads[stream]
        if (states.device, heads) not in self._head_indices:
            head_indices = torch.tensor(heads)[:, None]
            self._head_indices[states.device, heads] = upload(head_indices, states.device)
        batch_indices, positions = indices
        return states[batch_indices, self._head_indices[states.device, heads], positions]

    def flush_batch(self, sequence_lengths: Sequence[int] | None = None) -> None:
        """Hand the batch's rows to the sink, one chunk a layer and kind, without waiting for them.

        Args:
            sequence_lengths: Tokens that each sequence has in the end, where they are fewer than
                ``begin_batch`` was told.

        Raises:
            RuntimeError: No batch has begun, or a layer did not see all of its tokens.
        """
        if self._plan is None:
            raise RuntimeError("begin_batch must come before flush_batch")
        lengths = self._plan.lengths
        if sequence_lengths is not None:
            lengths = torch.as_tensor(sequence_lengths, dtype=torch.int64)
        for layer_idx, read in self._tokens_read.items():
            for tokens_read, length in zip(read, lengths.tolist(), strict=True):
                if tokens_read < length:
                    raise RuntimeError(
                        f"layer {layer_idx} was captured for {tokens_read} of {length} tokens"
                    )
        for stream in self._heads:
            if chunks := self._pending.pop(stream, None):
                self._flush_stream(stream, chunks, self._plan, lengths)
        self.close()

    def _flush_stream(
        self, stream: tuple[int, Kind], chunks: list[_PendingChunk], plan: _BatchPlan, lengths: Tensor
    ) -> None:
        rows, order = chunks[0].rows, None
        if len(chunks) > 1 or lengths is not plan.lengths:
            rows = torch.cat([chunk.rows for chunk in chunks])
            kept = plan.positions[rows] < lengths[plan.batch_indices[rows]]
            order = rows.argsort()
            order = order[kept[order]]
            rows = rows[order]
        if rows.numel() == 0:
            return
        self.rows_kept += len(self._heads[stream]) * rows.numel()
        self._sink(
            Chunk(
                layer_idx=stream[0],
                kind=stream[1],
                copies=[chunk.copy for chunk in chunks],
                order=order,
                numbers=plan.numbers.index_select(1, rows),
                sliding_window=chunks[-1].sliding_window,
            )
        )

    def close(self) -> None:
        """Drop what a batch that was never flushed left behind."""
        self._plan = None
        self._pending.clear()
        self._tokens_read.clear()


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

"""The sniffer: receives each layer's queries and keys, keeps the sampled rows, hands them on.

Everything that decides which rows are kept is known on the host before the forward, so a capture
inside the forward is one upload of indices for the batch and one gather for each layer and kind.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from qk_sniffer.capture.heads import CapturedHeads
from qk_sniffer.capture.sampling import Sampler, draw_positions

Kind = Literal["q", "k"]


@dataclass(frozen=True)
class Chunk:
    """The kept rows of one layer and kind from one batch, on the host.

    K rows are sorted by their place in the batch and by position.

    Attributes:
        layer_idx: Layer in the text decoder, from 0.
        kind: "q" or "k".
        vectors: (n_heads, K, head_dim) in the dtype of the model; heads as in ``CapturedHeads``.
        example_ids: (K,) int32.
        positions: (K,) int32, absolute.
        buckets: (K,) int32.
        sliding_window: The window that the layer used; None attends to all earlier tokens.
    """

    layer_idx: int
    kind: Kind
    vectors: Tensor
    example_ids: Tensor
    positions: Tensor
    buckets: Tensor
    sliding_window: int | None


@dataclass(frozen=True)
class _PendingChunk:
    """Gathered rows that are still on the device of their layer."""

    layer_idx: int
    kind: Kind
    vectors: Tensor
    sliding_window: int | None


class _BatchPlan:
    """The rows that each layer and kind keeps of one batch, drawn before the forward.

    Rows of every layer and kind lie in one tensor, so that a device gets them in one upload.
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
        self.positions = positions
        self.batch_indices = sequences % batch_size
        self.example_ids = example_ids[self.batch_indices]
        self.buckets = sampler.buckets(positions)
        counts = torch.bincount(sequences // batch_size, minlength=len(streams))
        ends = counts.cumsum(0)
        self.rows: dict[tuple[int, Kind], slice] = {
            stream: slice(start, end)
            for stream, start, end in zip(streams, (ends - counts).tolist(), ends.tolist(), strict=True)
        }
        self.length = int(lengths.max())
        self._on_device: dict[torch.device, Tensor] = {}

    def indices(self, device: torch.device) -> Tensor:
        """(2, rows) int64 on ``device``: index into the batch, and position."""
        if device not in self._on_device:
            indices = torch.stack([self.batch_indices, self.positions])
            if device.type == "cuda":
                indices = indices.pin_memory()
            self._on_device[device] = indices.to(device, non_blocking=True)
        return self._on_device[device]


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

    For each batch call ``begin_batch``, run the model's forward, in which every attention layer calls
    ``capture``, and call ``flush_batch``.

    Args:
        heads: The captured heads by layer.
        sampler: Which positions are kept.
        seed: 64-bit seed of the random stream.
        sink: Called with every chunk when a batch is flushed.
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
        self._pending: list[_PendingChunk] = []
        self._head_indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self.rows_kept = 0
        """Rows flushed so far, over all heads."""

    def begin_batch(self, example_ids: Sequence[int], sequence_lengths: Sequence[int]) -> None:
        """Draw the rows of a batch; both arguments have one integer for each sequence."""
        self._pending.clear()
        self._plan = _BatchPlan(
            list(self._heads),
            torch.as_tensor(example_ids, dtype=torch.int64),
            torch.as_tensor(sequence_lengths, dtype=torch.int64),
            self._sampler,
            self._seed,
        )

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
            query: (B, num_attention_heads, S, head_dim).
            key: (B, num_key_value_heads, S, head_dim).
            positions: (S,) absolute positions of the tokens, int64 on the CPU.
            sliding_window: The layer's window; None for full attention.

        Raises:
            RuntimeError: No batch has begun, or the call does not hold the batch's whole sequences.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("begin_batch must come before the forward that is captured")
        first, length = int(positions[0]), positions.numel()
        if first != 0 or length < plan.length or key.shape[2] != length:
            raise RuntimeError(
                f"layer {layer_idx}: the call has {length} queries from position {first} and "
                f"{key.shape[2]} keys, where the batch has {plan.length} tokens"
            )
        states: tuple[tuple[Kind, Tensor], ...] = (("q", query), ("k", key))
        for kind, vectors in states:
            if (layer_idx, kind) in self._heads:
                kept = self._gather(plan, layer_idx, kind, vectors)
                self._pending.append(_PendingChunk(layer_idx, kind, kept, sliding_window))

    def _gather(self, plan: _BatchPlan, layer_idx: int, kind: Kind, states: Tensor) -> Tensor:
        """The kept rows of all captured heads in one gather: (n_heads, K, head_dim)."""
        batch_indices, positions = plan.indices(states.device)[:, plan.rows[layer_idx, kind]]
        heads = self._heads[layer_idx, kind]
        if (states.device, heads) not in self._head_indices:
            indices = torch.tensor(heads, device=states.device)
            self._head_indices[states.device, heads] = indices[:, None]
        return states[batch_indices, self._head_indices[states.device, heads], positions]

    def flush_batch(self) -> None:
        """Copy the batch's rows to the host, once for each layer and kind, and hand them to the sink.

        Raises:
            RuntimeError: A layer was captured other than once, so rows would be missing or doubled.
        """
        plan, pending = self._plan, self._pending
        self._plan, self._pending = None, []
        if plan is None:
            raise RuntimeError("begin_batch must come before flush_batch")
        calls = Counter((chunk.layer_idx, chunk.kind) for chunk in pending)
        for stream in self._heads:
            if calls[stream] != 1:
                raise RuntimeError(
                    f"layer {stream[0]} was captured {calls[stream]} times in one batch, not once"
                )
        for chunk in pending:
            self._flush_chunk(plan, chunk)

    def _flush_chunk(self, plan: _BatchPlan, chunk: _PendingChunk) -> None:
        n_heads, n_rows = chunk.vectors.shape[:2]
        if n_rows == 0:
            return
        self.rows_kept += n_heads * n_rows
        rows = plan.rows[chunk.layer_idx, chunk.kind]
        self._sink(
            Chunk(
                layer_idx=chunk.layer_idx,
                kind=chunk.kind,
                vectors=chunk.vectors.cpu(),
                example_ids=plan.example_ids[rows].to(torch.int32),
                positions=plan.positions[rows].to(torch.int32),
                buckets=plan.buckets[rows].to(torch.int32),
                sliding_window=chunk.sliding_window,
            )
        )

    def close(self) -> None:
        """Drop what a batch that was never flushed left behind."""
        self._plan, self._pending = None, []


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

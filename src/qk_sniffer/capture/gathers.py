"""Gathers: which vectors of an attention call are taken, and where they go.

What a forward does between two attention calls drives everything else out of the processor's caches, so
that each step in the middle of it costs several times what it costs beside its like. The gathers of all
layers whose states were laid out alike in the last forward are therefore prepared together, when the
first of them comes, and the others are left one call of torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qk_sniffer.capture.buffers import ALIGNMENT, Staging, upload
from qk_sniffer.capture.heads import Stream
from qk_sniffer.capture.plan import KeptRows
from qk_sniffer.capture.positions import own_keys
from qk_sniffer.capture.rows import Block
from qk_sniffer.capture.softmax import SoftmaxInput, SoftmaxStatistics
from qk_sniffer.kinds import Kind


class Layout(NamedTuple):
    """How the states of an attention call lie in memory."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    """(B, n_heads, S, head_dim)."""
    strides: tuple[int, ...]

    @property
    def width(self) -> int:
        """head_dim."""
        return self.shape[3]

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector."""
        return self.width * self.dtype.itemsize

    def as_matrix(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape and strides of the states as a matrix whose rows are vectors."""
        size, step, _ = _row_steps(self.shape, self.strides)
        return (size, self.width), (step, 1)

    def steps(self) -> tuple[int, int, int]:
        """Rows of that matrix from one sequence, head and token to the next."""
        return _row_steps(self.shape, self.strides)[2]


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


class Gather(NamedTuple):
    """The kept vectors of one layer and kind in one attention call.

    Attributes:
        layout: How the states lie.
        n_heads: Captured heads.
        n_rows: K, kept rows of each head.
        vectors: Where (n_heads, K, head_dim) begin in the bytes of the staging.
        rows: Where the numbers of the rows, (3, K), begin in those of the passage.
    """

    layout: Layout
    n_heads: int
    n_rows: int
    vectors: int
    rows: int

    @property
    def n_vectors(self) -> int:
        """Vectors of all heads."""
        return self.n_heads * self.n_rows

    def block(self, stream: Stream, sliding_window: int | None, first: int) -> Block:
        """What they are, for a sink.

        Args:
            stream: Layer and kind.
            sliding_window: The layer's.
            first: Where the numbers of the passage begin.
        """
        return Block(
            *stream,
            sliding_window,
            _dtype_name(self.layout.dtype),
            self.n_heads,
            self.n_rows,
            self.layout.width,
            self.vectors,
            first + self.rows,
        )


@lru_cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Prepared(NamedTuple):
    """A gather that only waits for its states.

    Attributes:
        gather: What it is.
        shape: Of the states as a matrix of vectors.
        strides: Of that matrix.
        places: (n_heads * K,) int64, the rows of the matrix that are taken.
        room: (n_heads * K, head_dim), where they go.
    """

    gather: Gather
    shape: tuple[int, int]
    strides: tuple[int, int]
    places: Tensor
    room: Tensor


def result_states(
    value: Tensor | None, output: Tensor | None, start: int, n_tokens: int
) -> dict[Kind, Tensor]:
    """The result of an attention call, (B, n_heads, S, width) each, for ``Gathers.gather_call``.

    Args:
        value: (B, num_key_value_heads, K, width), as the keys of the call; None for none.
        output: (B, S, num_attention_heads, width); None for none.
        start: Tokens in the cache before the call.
        n_tokens: S.
    """
    states: dict[Kind, Tensor] = {}
    if value is not None:
        states["v"] = own_keys(value, start, n_tokens)
    if output is not None:
        states["o"] = output.transpose(1, 2)
    return states


class Gathers:
    """Gathers kept vectors into a staging.

    Args:
        heads: The captured heads of each layer and kind, in the order in which a model calls them.
        staging: Takes the vectors.
        statistics: Computes those of kept queries.
    """

    def __init__(
        self,
        heads: Mapping[Stream, tuple[int, ...]],
        staging: Staging,
        statistics: SoftmaxStatistics,
    ) -> None:
        self._heads = heads
        self._staging = staging
        self._statistics = statistics
        self._head_numbers = {s: np.array(numbers)[:, None] for s, numbers in heads.items()}
        self._layouts: dict[Stream, Layout] = {}
        self._alike: dict[Stream, list[Stream]] = {}
        self._is_grouped = True
        self._passage: KeptRows | None = None
        self._prepared: dict[Stream, _Prepared] = {}
        self._fits: bool | None = None
        self._widest = 0
        self._head_steps: dict[tuple[torch.device, tuple[int, ...], int], Tensor] = {}

    def gather_call(
        self,
        layer_idx: int,
        states: Mapping[Kind, Tensor],
        passage: KeptRows,
        softmax: SoftmaxInput | None = None,
    ) -> Iterator[tuple[Stream, Gather]]:
        """Lay down the kept vectors of one attention call, and give what there are.

        Args:
            layer_idx: The layer.
            states: Vectors of some kinds, (B, n_heads, S, width), those of the queries' own tokens.
            passage: The kept rows of the forward.
            softmax: What the call's softmax takes, where its statistics are wanted.
        """
        for kind, vectors in states.items():
            stream = layer_idx, kind
            if stream in self._heads:
                plain = vectors.detach() if vectors.requires_grad else vectors
                if (gather := self.gather(stream, plain, passage)) is not None:
                    yield stream, gather
        if softmax is None:
            return
        values = self._statistics.of(layer_idx, softmax, passage)
        if values is not None:
            of_softmax: Stream = (layer_idx, "softmax")
            yield of_softmax, self._lay_down(of_softmax, values, passage)

    def gather(self, stream: Stream, states: Tensor, passage: KeptRows) -> Gather | None:
        """Lay down the kept vectors of all captured heads, head by head; None where there are none.

        Args:
            stream: Layer and kind.
            states: (B, n_heads, S, head_dim) of the forward's sequences and tokens.
            passage: Its kept rows.
        """
        if passage is not self._passage:
            self._begin(passage)
        if passage.sizes[passage.draws[stream]] == 0:
            return None
        if states.stride(3) != 1:
            states = states.contiguous()
        layout = Layout(states.device, states.dtype, states.shape, states.stride())
        prepared = self._prepared.pop(stream, None)
        if prepared is None or prepared.gather.layout != layout:
            if self._fits is None:
                self._fits = self._fits_whole(layout, passage)
            # Where one is not as it was, the others may be.
            alike = self._alike_from(stream) if prepared is None else [stream]
            if not (self._fits and self._prepare(alike, layout, passage)):
                return self._gather_in_parts(stream, states, layout, passage)
            prepared = self._prepared.pop(stream)
        gather, shape, strides, places, room = prepared
        torch.index_select(states.as_strided(shape, strides), 0, places, out=room)
        return gather

    def _lay_down(self, stream: Stream, values: Tensor, passage: KeptRows) -> Gather:
        """Lay down what was computed of all kept rows of a layer.

        Args:
            stream: Layer and part.
            values: (n_heads, K, width), K > 0.
            passage: The kept rows of the forward.
        """
        layout = Layout(values.device, values.dtype, values[None].shape, values[None].stride())
        if not self._fits_together([stream], layout.row_bytes, layout.device, passage):
            # What is prepared and not gathered would be handed on without its vectors.
            self._prepared = {}
        gather = self._described(stream, layout, passage, self._staging.align())
        rows, done = values.flatten(0, 1), 0
        while done < len(rows):
            room = self._staging.room(layout.device, layout.dtype, len(rows) - done, layout.width)
            room.copy_(rows[done : done + len(room)])
            done += len(room)
        return gather

    def _begin(self, passage: KeptRows) -> None:
        self._passage, self._prepared, self._fits = passage, {}, None
        if not self._is_grouped:
            self._is_grouped = True
            groups: dict[Layout, list[Stream]] = {}
            for stream in self._heads:
                if stream in self._layouts:
                    groups.setdefault(self._layouts[stream], []).append(stream)
            self._alike = {stream: group for group in groups.values() for stream in group}

    def _fits_whole(self, layout: Layout, passage: KeptRows) -> bool:
        """Whether the open buffer takes the vectors of all layers and kinds, as wide as they were."""
        self._widest = max(self._widest, layout.row_bytes)
        return self._fits_together(list(self._heads), self._widest, layout.device, passage)

    def _fits_together(
        self, streams: Sequence[Stream], row_bytes: int, device: torch.device, passage: KeptRows
    ) -> bool:
        n_vectors = sum(len(self._heads[s]) * passage.sizes[passage.draws[s]] for s in streams)
        return self._staging.fits(n_vectors * row_bytes + len(streams) * ALIGNMENT, device)

    def _alike_from(self, stream: Stream) -> list[Stream]:
        """A layer and kind, and those behind it that were laid out like it in the last forward."""
        alike = self._alike.get(stream, [stream])
        return alike[alike.index(stream) :]

    def _prepare(self, streams: Sequence[Stream], layout: Layout, passage: KeptRows) -> bool:
        """Find places for layers and kinds of one layout, where they fit into the buffer."""
        if not self._staging.is_open(layout.device):
            # What is prepared and not gathered would be handed on without its vectors.
            self._prepared = {}
            self._staging.open(layout.device)
        if not self._fits_together(streams, layout.row_bytes, layout.device, passage):
            return False
        self._note(streams, layout)
        kept = [stream for stream in streams if passage.sizes[passage.draws[stream]]]
        start = self._staging.align()
        gathers = []
        for stream in kept:
            gathers.append(gather := self._described(stream, layout, passage, start))
            start += gather.n_vectors * layout.row_bytes
        counts = [gather.n_vectors for gather in gathers]
        rooms = torch.split(self._staging.placed(layout.dtype, sum(counts), layout.width), counts)
        places = self._places_on_host(kept, gathers, layout, passage)
        split = torch.split(upload(places, layout.device), counts)
        shape, strides = layout.as_matrix()
        self._prepared |= {
            stream: _Prepared(gather, shape, strides, own, room)
            for stream, gather, own, room in zip(kept, gathers, split, rooms, strict=True)
        }
        return True

    def _note(self, streams: Sequence[Stream], layout: Layout) -> None:
        """Remember how layers and kinds are laid out, together or one alone."""
        if len(streams) == 1 and self._layouts.get(streams[0]) != layout:
            self._is_grouped = False
        self._layouts.update(dict.fromkeys(streams, layout))

    def _places_on_host(
        self, streams: Sequence[Stream], gathers: Sequence[Gather], layout: Layout, passage: KeptRows
    ) -> Tensor:
        """Where the kept vectors of some layers and kinds lie in the matrices of their states."""
        per_sequence, per_head, per_token = layout.steps()
        steps = passage.steps_on_host(per_sequence, per_token)
        places = np.empty(sum(gather.n_vectors for gather in gathers), np.int64)
        stop = 0
        for stream, (_, n_heads, n_rows, _, rows) in zip(streams, gathers, strict=True):
            start, stop = stop, stop + n_heads * n_rows
            own = steps[rows // 3 : rows // 3 + n_rows]
            room = places[start:stop].reshape(n_heads, n_rows)
            np.add(per_head * self._head_numbers[stream], own, out=room)
        return torch.from_numpy(places)

    def _described(self, stream: Stream, layout: Layout, passage: KeptRows, start: int) -> Gather:
        """The gather whose vectors begin at a byte of the staging."""
        draw = passage.draws[stream]
        n_rows = passage.sizes[draw]
        rows = 3 * (passage.stops[draw] - n_rows)
        return Gather(layout, len(self._heads[stream]), n_rows, start, rows)

    def _gather_in_parts(
        self, stream: Stream, states: Tensor, layout: Layout, passage: KeptRows
    ) -> Gather:
        """Gather more than the open buffer takes."""
        self._prepared = {}
        self._note([stream], layout)
        gather = self._described(stream, layout, passage, self._staging.align())
        vectors = states.as_strided(*layout.as_matrix())
        done, total = 0, gather.n_vectors
        while done < total:
            room = self._staging.room(layout.device, layout.dtype, total - done, layout.width)
            stop = done + room.shape[0]
            places = self._places(stream, layout, passage, done, stop)
            torch.index_select(vectors, 0, places, out=room)
            done = stop
        return gather

    def _places(
        self, stream: Stream, layout: Layout, passage: KeptRows, start: int, stop: int
    ) -> Tensor:
        """Where some of the kept vectors lie in the matrix of the states, by their numbers."""
        per_sequence, per_head, per_token = layout.steps()
        steps = passage.steps(layout.device, per_sequence, per_token)[passage.draws[stream]]
        n_rows = len(steps)
        first = start // n_rows
        head_steps = self._steps_to_heads(layout.device, self._heads[stream], per_head)
        places = (head_steps[first : -(-stop // n_rows)] + steps).view(-1)
        return places[start - first * n_rows : stop - first * n_rows]

    def _steps_to_heads(self, device: torch.device, heads: tuple[int, ...], per_head: int) -> Tensor:
        """(n_heads, 1) int64 on ``device``."""
        key = device, heads, per_head
        if key not in self._head_steps:
            self._head_steps[key] = upload(per_head * torch.tensor(heads)[:, None], device)
        return self._head_steps[key]

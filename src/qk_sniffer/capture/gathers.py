"""Gathers: which vectors of an attention call are taken, and where they go.

What a forward does between two attention calls drives everything else out of the processor's caches, so
that each step in the middle of it costs several times what it costs beside its like. The gathers of all
layers whose states were laid out alike in the last forward are therefore prepared together, when the
first of them comes, and the others are left one call of torch.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qk_sniffer.capture.buffers import ALIGNMENT, Staging, upload
from qk_sniffer.capture.plan import Passage, Stream


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


class Gathers:
    """Gathers kept vectors into a staging.

    Args:
        heads: The captured heads of each layer and kind, in the order in which a model calls them.
        staging: Takes the vectors.
    """

    def __init__(self, heads: Mapping[Stream, tuple[int, ...]], staging: Staging) -> None:
        self._heads = heads
        self._staging = staging
        streams = list(heads)
        self._head_numbers = {s: np.array(numbers)[:, None] for s, numbers in heads.items()}
        self._later = {stream: streams[number + 1 :] for number, stream in enumerate(streams)}
        self._layouts: dict[Stream, Layout] = {}
        self._passage: Passage | None = None
        self._prepared: dict[Stream, _Prepared] = {}
        self._fits: bool | None = None
        self._widest = 0
        self._head_steps: dict[tuple[torch.device, tuple[int, ...], int], Tensor] = {}

    def gather(self, stream: Stream, states: Tensor, passage: Passage) -> Gather | None:
        """Lay down the kept vectors of all captured heads, head by head; None where there are none.

        Args:
            stream: Layer and kind.
            states: (B, n_heads, S, head_dim) of the passage's sequences and tokens.
            passage: Its kept rows.
        """
        if passage is not self._passage:
            self._passage, self._prepared, self._fits = passage, {}, None
        n_rows = passage.sizes[passage.draws[stream]]
        if n_rows == 0:
            return None
        if states.stride(3) != 1:
            states = states.contiguous()
        layout = Layout(states.device, states.dtype, states.shape, states.stride())
        prepared = self._prepared.pop(stream, None)
        if prepared is None or prepared.gather.layout != layout:
            if self._fits is None:
                self._fits = self._fits_whole(layout, passage)
            if self._fits:
                # Where one is not as it was, the others may be.
                alike = self._alike(stream) if prepared is None else []
                self._prepare([stream, *alike], layout, passage)
            prepared = self._prepared.pop(stream, None)
            if prepared is None:
                return self._gather_in_parts(stream, states, layout, passage)
        gather, shape, strides, places, room = prepared
        torch.index_select(states.as_strided(shape, strides), 0, places, out=room)
        return gather

    def _fits_whole(self, layout: Layout, passage: Passage) -> bool:
        """Whether the open buffer takes the vectors of all layers and kinds, as wide as they were."""
        self._widest = max(self._widest, layout.row_bytes)
        n_vectors = sum(
            len(heads) * passage.sizes[passage.draws[stream]] for stream, heads in self._heads.items()
        )
        n_bytes = n_vectors * self._widest + len(self._heads) * ALIGNMENT
        return self._staging.fits(n_bytes, layout.device)

    def _alike(self, stream: Stream) -> list[Stream]:
        """The layers and kinds behind one that were laid out like it."""
        known = self._layouts.get(stream)
        if known is None:
            return []
        return [other for other in self._later[stream] if self._layouts.get(other) == known]

    def _prepare(self, streams: Sequence[Stream], layout: Layout, passage: Passage) -> None:
        """Find places for layers and kinds of one layout."""
        if not self._staging.is_open(layout.device):
            # What is prepared and not gathered would be handed on without its vectors.
            self._prepared = {}
            self._staging.open(layout.device)
        gathers, rooms = self._placed_together(streams, layout, passage)
        places = np.empty(sum(map(len, rooms)), np.int64)
        per_sequence, per_head, per_token = layout.steps()
        steps = passage.steps_on_host(per_sequence, per_token)
        stop = 0
        for other, gather in gathers.items():
            first = gather.rows // 3
            start, stop = stop, stop + gather.n_heads * gather.n_rows
            np.add(
                per_head * self._head_numbers[other],
                steps[first : first + gather.n_rows],
                out=places[start:stop].reshape(gather.n_heads, gather.n_rows),
            )
        shape, strides = layout.as_matrix()
        split = torch.split(upload(torch.from_numpy(places), layout.device), list(map(len, rooms)))
        for (other, gather), own, room in zip(gathers.items(), split, rooms, strict=True):
            self._prepared[other] = _Prepared(gather, shape, strides, own, room)

    def _placed_together(
        self, streams: Sequence[Stream], layout: Layout, passage: Passage
    ) -> tuple[dict[Stream, Gather], list[Tensor]]:
        """The gathers of those that fit into the buffer, and where their vectors go."""
        gathers, rooms = {}, []
        for stream in streams:
            n_rows = passage.sizes[passage.draws[stream]]
            n_vectors = len(self._heads[stream]) * n_rows
            if not self._staging.fits(n_vectors * layout.row_bytes, layout.device):
                break
            self._layouts[stream] = layout
            if n_rows:
                start, room = self._staging.placed(layout.dtype, n_vectors, layout.width)
                gathers[stream] = self._described(stream, layout, passage, start)
                rooms.append(room)
        return gathers, rooms

    def _described(self, stream: Stream, layout: Layout, passage: Passage, start: int) -> Gather:
        """The gather whose vectors begin at a byte of the staging."""
        draw = passage.draws[stream]
        n_rows = passage.sizes[draw]
        rows = 3 * (passage.stops[draw] - n_rows)
        return Gather(layout, len(self._heads[stream]), n_rows, start, rows)

    def _gather_in_parts(
        self, stream: Stream, states: Tensor, layout: Layout, passage: Passage
    ) -> Gather:
        """Gather more than the open buffer takes."""
        self._prepared = {}
        self._layouts[stream] = layout
        gather = self._described(stream, layout, passage, self._staging.align())
        vectors = states.as_strided(*layout.as_matrix())
        done, total = 0, gather.n_heads * gather.n_rows
        while done < total:
            room = self._staging.room(layout.device, layout.dtype, total - done, layout.width)
            stop = done + room.shape[0]
            places = self._places(stream, layout, passage, done, stop)
            torch.index_select(vectors, 0, places, out=room)
            done = stop
        return gather

    def _places(
        self, stream: Stream, layout: Layout, passage: Passage, start: int, stop: int
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

"""Captured rows in memory."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qk_sniffer.capture import BatchRows, CapturedStream, Portion, Stream
from qk_sniffer.errors import UserError

_SMALL_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one layer and kind.

    Attributes:
        vectors: (n_heads, K, head_dim) in the model's dtype, on the host or the model's device.
        numbers: (3, K) int32: example id, position and bucket.
    """

    vectors: Tensor
    numbers: Tensor


def _some(rows: Rows, chosen: Tensor) -> Rows:
    return Rows(rows.vectors[:, chosen.to(rows.vectors.device)], rows.numbers[:, chosen])


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(
        torch.cat([part.vectors for part in parts], dim=1),
        torch.cat([part.numbers for part in parts], dim=1),
    )


def _is_small_beside(part: Rows, other: Rows) -> bool:
    """Whether to join two, so that there are few parts and each row is copied few times."""
    return part.vectors.nbytes + other.vectors.nbytes < _SMALL_BYTES and (
        part.vectors.nbytes < 2 * other.vectors.nbytes
    )


class RowStore:
    """Keeps the rows of all calls, of several threads.

    Args:
        streams: The captured heads of each layer and kind.
        limit_bytes: The most that vectors may take.
    """

    def __init__(self, streams: Iterable[CapturedStream], limit_bytes: int) -> None:
        self._parts: dict[Stream, list[Rows]] = {
            stream.key: [
                Rows(
                    torch.empty(len(stream.heads), 0, stream.width),
                    torch.empty(3, 0, dtype=torch.int32),
                )
            ]
            for stream in streams
        }
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self.n_bytes = 0
        """Bytes of the vectors."""

    def require_room(self, n_bytes: int) -> None:
        """See that so many bytes more are within the limit.

        Raises:
            UserError: They are not.
        """
        if self.n_bytes + n_bytes > self._limit_bytes:
            raise UserError(
                f"limit_bytes: the rows take more than {self._limit_bytes:,} bytes; keep fewer with "
                "layers, heads, kinds or sampler, or give more"
            )

    def add(self, rows: dict[Stream, Rows]) -> None:
        """Keep the rows of a call."""
        with self._lock:
            for stream, part in rows.items():
                self.n_bytes += part.vectors.nbytes
                parts = self._parts[stream]
                # Of tokens that come one by one there would be more tensors than bytes.
                while len(parts) > 1 and _is_small_beside(parts[-1], part):
                    part = _joined([parts.pop(), part])
                parts.append(part)

    @property
    def streams(self) -> list[Stream]:
        """Its layers and kinds."""
        return list(self._parts)

    def take(self, example_ids: Iterable[int]) -> dict[Stream, Rows]:
        """Remove the rows of some texts, and give them, sorted as ``rows`` does."""
        ids, taken = torch.tensor(list(example_ids), dtype=torch.int32), {}
        for stream in self._parts:
            rows = self.rows(stream)
            chosen = torch.isin(rows.numbers[0], ids)
            taken[stream] = _some(rows, chosen)
            with self._lock:
                # Other threads may have added to what was looked at.
                self._parts[stream][0] = _some(rows, ~chosen)
                self.n_bytes -= taken[stream].vectors.nbytes
        return taken

    def n_rows(self, stream: Stream) -> int:
        """Rows of each head of a layer and kind."""
        return sum(part.numbers.shape[1] for part in self._parts[stream])

    def rows(self, stream: Stream) -> Rows:
        """The rows of a layer and kind, sorted by example id and position."""
        with self._lock:
            parts = self._parts[stream]
            if len(parts) > 1:
                # The first may be empty, and then has another dtype.
                joined = _joined([part for part in parts if part.numbers.numel()] or parts[:1])
                order = ((joined.numbers[0].long() << 32) + joined.numbers[1]).argsort(stable=True)
                if not torch.equal(order, torch.arange(len(order))):
                    joined = _some(joined, order)
                self._parts[stream] = [joined]
            return self._parts[stream][0]


class Intake:
    """A sink that brings the rows of one thread's calls to the store."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._portions: list[tuple[int, Tensor]] = []
        """Bytes, and the number of the first of them."""

    def take_vectors(self, portion: Portion) -> None:
        """Copy some bytes.

        Raises:
            UserError: They are more than the store may take.
        """
        if portion.start == 0:
            self._portions = []
        try:
            self._store.require_room(portion.start + portion.n_bytes)
            self._portions.append((portion.start, portion.tensor().clone()))
        finally:
            portion.release()

    def take_rows(self, rows: BatchRows) -> None:
        """Keep the rows that the bytes are."""
        found = {}
        for block in rows.blocks:
            content = self._bytes(block.vectors, block.vectors + block.n_bytes)
            vectors = block.vectors_in(content, block.vectors)
            found[block.layer_idx, block.kind] = Rows(vectors, block.part_of(rows.numbers))
        self._portions = []
        self._store.add(found)

    def _bytes(self, start: int, stop: int) -> Tensor:
        """Some bytes, which lie in one portion or in several of one device."""
        parts = [
            content[max(0, start - first) : stop - first]
            for first, content in self._portions
            if first < stop and start < first + content.numel()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

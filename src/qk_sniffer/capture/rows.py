"""What captured vectors are: their blocks, the numbers of their rows, and where both go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qk_sniffer.capture.buffers import Portion
from qk_sniffer.kinds import Part


class Block(NamedTuple):
    """The kept rows of one layer and kind in one attention call.

    K rows are sorted by their place in the batch and by position.

    Attributes:
        layer_idx: Layer in the text decoder, from 0.
        kind: Queries, keys, values, outputs, or the statistics of each query.
        sliding_window: The window that the layer used; None attends to all earlier tokens.
        dtype: Number format of the vectors, the model's, by its name in torch.
        n_heads: Captured heads.
        n_rows: K.
        head_dim: Width of a vector.
        vectors: The byte where (n_heads, K, head_dim) begin, among those that are handed on together.
        rows: Where (3, K) begin in their numbers.
    """

    layer_idx: int
    kind: Part
    sliding_window: int | None
    dtype: str
    n_heads: int
    n_rows: int
    head_dim: int
    vectors: int
    rows: int

    def vectors_in(self, content: Tensor, first: int = 0) -> Tensor:
        """Its vectors: (n_heads, K, head_dim), a view.

        Args:
            content: (N,) uint8, some of the bytes that are handed on together.
            first: The number of the first of them.
        """
        start = self.vectors - first
        flat = content[start : start + self.n_bytes].view(getattr(torch, self.dtype))
        return flat.view(self.n_heads, self.n_rows, self.head_dim)

    @property
    def n_bytes(self) -> int:
        """Bytes of its vectors."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.n_heads * self.n_rows * self.head_dim * dtype.itemsize

    def part_of(self, numbers: Tensor) -> Tensor:
        """Example id, position and bucket of each of its rows: (3, K).

        Args:
            numbers: Those that are handed on together.
        """
        return numbers[self.rows : self.rows + 3 * self.n_rows].view(3, self.n_rows)


@dataclass(frozen=True)
class BatchRows:
    """What the bytes of some batches are, of one or of several that follow each other.

    Attributes:
        example_ids: (B,) int64, of the batches' sequences.
        blocks: Their blocks; those of a layer and kind in the order of their tokens.
        numbers: (N,) int32. A block's part, (3, K), has example id, position and bucket of each row;
            the position is -1 where a sequence has ended before it. Blocks may share a part.
    """

    example_ids: Tensor
    blocks: Sequence[Block]
    numbers: Tensor


class Sink(Protocol):
    """Where captured rows go."""

    def take_vectors(self, portion: Portion) -> None:
        """Take some bytes, in their order; they may still be on their way to the host."""

    def take_rows(self, rows: BatchRows) -> None:
        """Take what the bytes since the first are; what follows begins at byte 0 again."""

"""Captured rows in memory: what a sniffer hands on, as tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qk_sniffer.capture.buffers import Portion
from qk_sniffer.capture.rows import BatchRows, Block
from qk_sniffer.kinds import Part


@dataclass(frozen=True)
class Chunk:
    """The kept rows of one layer and kind from one batch.

    K rows are sorted by their place in the batch and by position.

    Attributes:
        layer_idx: Layer in the text decoder, from 0.
        kind: Queries, keys, values, outputs, or the statistics of each query.
        vectors: (n_heads, K, head_dim) in the dtype of the model.
        example_ids: (K,) int32.
        positions: (K,) int32, absolute.
        buckets: (K,) int32.
        sliding_window: The window that the layer used; None attends to all earlier tokens.
    """

    layer_idx: int
    kind: Part
    vectors: Tensor
    example_ids: Tensor
    positions: Tensor
    buckets: Tensor
    sliding_window: int | None


class Chunks(list[Chunk]):
    """A sink that keeps the chunks of every batch: a list of them, in the order of their capture."""

    def __init__(self) -> None:
        super().__init__()
        self._portions: list[Tensor] = []

    def take_vectors(self, portion: Portion) -> None:
        """Copy some bytes."""
        if portion.start == 0:
            self._portions.clear()
        self._portions.append(torch.from_numpy(portion.wait()).clone())
        portion.release()

    def take_rows(self, rows: BatchRows) -> None:
        """Add the chunks of a batch."""
        content = torch.cat([torch.empty(0, dtype=torch.uint8), *self._portions])
        self._portions.clear()
        blocks: dict[tuple[int, Part], list[Block]] = {}
        for block in rows.blocks:
            blocks.setdefault((block.layer_idx, block.kind), []).append(block)
        for parts in blocks.values():
            self.append(_chunk(parts, rows, content))


def _chunk(blocks: list[Block], rows: BatchRows, content: Tensor) -> Chunk:
    """One chunk of the blocks of a layer and kind."""
    vectors = torch.cat([block.vectors_in(content) for block in blocks], dim=1)
    numbers = torch.cat([block.part_of(rows.numbers) for block in blocks], dim=1)
    places = {example_id: place for place, example_id in enumerate(rows.example_ids.tolist())}
    order = torch.tensor([places[example_id] for example_id in numbers[0].tolist()])
    order = order.argsort(stable=True)
    order = order[numbers[1, order] >= 0]
    example_ids, positions, buckets = numbers[:, order]
    return Chunk(
        blocks[-1].layer_idx,
        blocks[-1].kind,
        vectors[:, order],
        example_ids,
        positions,
        buckets,
        blocks[-1].sliding_window,
    )

"""What one process captures of a model that it may share with others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qk_sniffer.capture import (
    AttentionLayer,
    CapturedHeads,
    CapturedStream,
    ModelShard,
    captured_streams,
)
from qk_sniffer.kinds import Kind, Part
from qk_sniffer.moments import MomentTable
from qk_sniffer.storage import Shard


class OwnStreams:
    """The captured heads that fall to one process, as its attention calls and the journal number them.

    Args:
        heads: All captured heads, by layer.
        parts: What is captured of each attention call.
        shard: The process's place among those that share the model.
        layers: The attention layers as the process has them, where several share the model.

    Attributes:
        streams: Those of each layer and part that has any, by their numbers in the attention calls.
        shard: By their numbers in the whole model, for the journal; None where the process has all.
    """

    def __init__(
        self,
        heads: Mapping[int, CapturedHeads],
        parts: Iterable[Part],
        shard: ModelShard,
        layers: Sequence[AttentionLayer],
    ) -> None:
        parts = list(parts)
        self.shard: Shard | None = None
        if shard.count == 1:
            self.streams = captured_streams(heads, parts)
            return
        own = captured_streams({number: shard.of(h) for number, h in heads.items()}, parts)
        held_layers = {layer.layer_idx: layer for layer in layers}
        self._held = captured_streams(
            {number: shard.held(h, held_layers[number]) for number, h in heads.items()}, parts
        )
        self.streams = [stream for stream in self._held if stream.heads]
        self.shard = Shard(shard.number, shard.count, tuple(stream.heads for stream in own))
        self._numbers = {
            (*stream.key, head): number
            for stream, whole in zip(self._held, own, strict=True)
            for head, number in zip(stream.heads, whole.heads, strict=True)
        }

    def with_served_keys(self) -> list[CapturedStream]:
        """The streams, with the key heads of all their query heads; some may fall to others."""
        if self.shard is None:
            return self.streams
        queries = {s.layer.layer_idx: s.heads for s in self._held if s.kind == "q"}
        streams = [
            replace(
                s, heads=tuple(sorted({*s.heads, *map(s.layer.key_head, queries[s.layer.layer_idx])}))
            )
            if s.kind == "k"
            else s
            for s in self._held
        ]
        return [stream for stream in streams if stream.heads]

    def as_whole(self, tables: Mapping[Kind, Sequence[MomentTable]]) -> dict[Kind, list[MomentTable]]:
        """Moments with the numbers that their heads have in the whole model, of those that are its own.

        Args:
            tables: With the numbers of this process's attention calls, by kind.
        """
        if self.shard is None:
            return {kind: list(some) for kind, some in tables.items()}
        return {
            kind: [self._renumbered(kind, table) for table in some] for kind, some in tables.items()
        }

    def _renumbered(self, kind: Kind, table: MomentTable) -> MomentTable:
        heads = zip(table.layer_idx.tolist(), table.head.tolist(), strict=True)
        numbers = np.array([self._numbers.get((layer, kind, head), -1) for layer, head in heads])
        own = table.select(numbers >= 0)
        return replace(own, head=numbers[numbers >= 0].astype(np.int32))

"""What one process captures of a model that it may share with others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qk_sniffer.capture import AttentionLayer, CapturedHeads, ModelShard, captured_streams
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
        held = {number: shard.held(h, held_layers[number]) for number, h in heads.items()}
        self.streams = [stream for stream in captured_streams(held, parts) if stream.heads]
        self.shard = Shard(shard.number, shard.count, tuple(stream.heads for stream in own))
        self._numbers = {stream.key: stream.heads for stream in own}
        self._held = {stream.key: stream.heads for stream in self.streams}

    def as_whole(self, tables: Mapping[Kind, Sequence[MomentTable]]) -> dict[Kind, list[MomentTable]]:
        """Moments with the numbers that their heads have in the whole model.

        Args:
            tables: With the numbers of this process's attention calls, by kind.
        """
        if self.shard is None:
            return {kind: list(some) for kind, some in tables.items()}
        return {
            kind: [self._renumbered(kind, table) for table in some] for kind, some in tables.items()
        }

    def _renumbered(self, kind: Kind, table: MomentTable) -> MomentTable:
        # The heads of a layer are neighbours, in one numbering as in the other.
        steps = [
            self._numbers[layer, kind][0] - self._held[layer, kind][0]
            for layer in table.layer_idx.tolist()
        ]
        return replace(table, head=table.head + np.array(steps, np.int32))

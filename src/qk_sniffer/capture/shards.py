"""Which heads fall to each of the processes that share a model."""

from dataclasses import dataclass

from qk_sniffer.capture.heads import AttentionLayer, CapturedHeads


@dataclass(frozen=True)
class ModelShard:
    """The place of a process among those that share a model.

    Neighbouring query heads fall to one process, as evenly as they can be divided, and a key head falls
    to the process that has the first query head that it serves. That holds where each process computes
    its own heads alone, and where each computes all of them.

    Attributes:
        number: Of the process, from 0.
        count: How many there are.
    """

    number: int = 0
    count: int = 1

    def query_heads(self, layer: AttentionLayer) -> range:
        """The query heads of a layer that fall to it.

        Args:
            layer: The whole layer.
        """
        n_heads = layer.num_attention_heads
        return range(self.number * n_heads // self.count, (self.number + 1) * n_heads // self.count)

    def key_heads(self, layer: AttentionLayer) -> range:
        """The key heads of a layer that fall to it; the argument is that of ``query_heads``."""
        queries, group = self.query_heads(layer), layer.num_attention_heads // layer.num_key_value_heads
        return range(-(-queries.start // group), -(-queries.stop // group))

    def computed_keys(self, layer: AttentionLayer) -> tuple[int, ...]:
        """The key heads of its attention calls, where it computes its own heads alone.

        Where the key heads can't be divided evenly, each query head has a copy of its own.
        """
        if layer.num_key_value_heads % self.count == 0:
            return tuple(self.key_heads(layer))
        return tuple(layer.key_head(head) for head in self.query_heads(layer))

    def of(self, captured: CapturedHeads) -> CapturedHeads:
        """The captured heads that fall to it, by their numbers in the whole layer."""
        layer = captured.layer
        query, key = self.query_heads(layer), self.key_heads(layer)
        return CapturedHeads(
            layer,
            tuple(head for head in captured.query if head in query),
            tuple(head for head in captured.key if head in key),
        )

    def held(self, captured: CapturedHeads, layer: AttentionLayer) -> CapturedHeads:
        """The same heads, by their numbers in the attention calls of this process.

        Args:
            captured: The captured heads of the whole layer.
            layer: The layer as this process computes it, with all heads or those that fall to it.
        """
        own, whole = self.of(captured), captured.layer
        if layer.num_attention_heads == whole.num_attention_heads:
            return CapturedHeads(layer, own.query, own.key)
        first, keys = self.query_heads(whole).start, self.computed_keys(whole)
        return CapturedHeads(
            layer,
            tuple(head - first for head in own.query),
            tuple(keys.index(head) for head in own.key),
        )


WHOLE_MODEL = ModelShard()
"""A process that has a model for itself."""

"""Which heads fall to each of the processes that share a model."""

from dataclasses import dataclass

from qk_sniffer.capture.heads import AttentionLayer, CapturedHeads


@dataclass(frozen=True)
class ModelShard:
    """The place of a process among those that share a model.

    Neighbouring key heads fall to one process, with the query heads that they serve, and to as many
    processes as there are as evenly as they can be divided. That holds where each process computes its
    own heads alone, and where each computes all of them.

    Attributes:
        number: Of the process, from 0.
        count: How many there are.
    """

    number: int = 0
    count: int = 1

    def key_heads(self, layer: AttentionLayer) -> range:
        """The key heads of a layer that fall to it.

        Args:
            layer: The whole layer.
        """
        return self._share(layer.num_key_value_heads)

    def query_heads(self, layer: AttentionLayer) -> range:
        """The query heads of a layer that fall to it; the argument is that of ``key_heads``."""
        keys, group = self.key_heads(layer), layer.num_attention_heads // layer.num_key_value_heads
        return range(keys.start * group, keys.stop * group)

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
        first_query, first_key = self.query_heads(whole).start, self.key_heads(whole).start
        return CapturedHeads(
            layer,
            tuple(head - first_query for head in own.query),
            tuple(head - first_key for head in own.key),
        )

    def _share(self, n_heads: int) -> range:
        return range(self.number * n_heads // self.count, (self.number + 1) * n_heads // self.count)


WHOLE_MODEL = ModelShard()
"""A process that has a model for itself."""

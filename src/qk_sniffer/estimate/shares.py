"""What each of several processes that share a model has of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from qk_sniffer.capture import WHOLE_MODEL, AttentionLayer, ModelShard
from qk_sniffer.estimate.capture import parameter_bytes
from qk_sniffer.models import attention_geometry, decoder_backbone, local_weights, model_share
from qk_sniffer.module import SnifferModule


@dataclass(frozen=True)
class Share:
    """The part of a model that a process has.

    Attributes:
        shard: Its place among those that share the model.
        layers: The attention layers of the whole model.
        held: The attention layers as it has them.
        weight_bytes: Memory of its weights.
    """

    shard: ModelShard
    layers: list[AttentionLayer]
    held: list[AttentionLayer]
    weight_bytes: int

    @property
    def has_all_heads(self) -> bool:
        """Whether it computes all attention heads, as the others do too."""
        return [layer.num_attention_heads for layer in self.held] == [
            layer.num_attention_heads for layer in self.layers
        ]

    @contextmanager
    def model(self, skeleton: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The part, without weights.

        Args:
            skeleton: The model; where a process has all of it, that is the part.
        """
        if self.shard.count == 1:
            yield skeleton
            return
        with model_share(skeleton, self.shard, self.layers) as share:
            yield share


def largest_share(
    module: SnifferModule, skeleton: PreTrainedModel, layers: list[AttentionLayer]
) -> Share:
    """The share of the process that has most of the model.

    Args:
        module: Says how many processes share it.
        skeleton: The model; it may be one without weights.
        layers: Its attention layers.

    Raises:
        UserError: The processes would not have the heads that fall to them.
    """
    count = module.tensor_parallel
    if count == 1:
        return Share(WHOLE_MODEL, layers, layers, parameter_bytes([*skeleton.parameters()]))
    shares = [_share(skeleton, ModelShard(number, count), layers) for number in range(count)]
    module.whole_layers([share.held for share in shares])
    return max(shares, key=lambda share: share.weight_bytes)


def _share(skeleton: PreTrainedModel, shard: ModelShard, layers: list[AttentionLayer]) -> Share:
    with model_share(skeleton, shard, layers) as share:
        held = attention_geometry(decoder_backbone(share)).layers
        return Share(shard, layers, held, parameter_bytes(local_weights(share)))

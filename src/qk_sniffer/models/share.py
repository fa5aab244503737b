"""What one of several processes has of a model, told without weights and without the others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from qk_sniffer.capture import AttentionLayer, ModelShard
from qk_sniffer.models.tensor_parallel import SharedModel, plan_of


@contextmanager
def model_share(
    skeleton: PreTrainedModel, shard: ModelShard, layers: Sequence[AttentionLayer]
) -> Iterator[PreTrainedModel]:
    """The part of a model that a process has, without weights; its forward can be followed meanwhile.

    A process group that sends nothing stands in for the others, so this process must be in none.

    Args:
        skeleton: The model, as ``load_skeleton`` gives it.
        shard: The process's place among those that share it.
        layers: The attention layers of the whole model.
    """
    share: Any = deepcopy(skeleton)
    dist.init_process_group(
        dist.Backend.FAKE, rank=shard.number, world_size=shard.count, store=FakeStore()
    )
    try:
        _untie(share)
        SharedModel(shard, torch.device("cpu"), plan_of(share), layers).distribute(share)
        share.tie_weights()
        yield share
    finally:
        dist.destroy_process_group()


def _untie(model: nn.Module) -> None:
    """Give each weight a parameter of its own, as a model has that is being loaded."""
    seen = set()
    for name, parameter in [*model.named_parameters(remove_duplicate=False)]:
        if parameter in seen:
            owner, _, last = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(owner), last, own)
        seen.add(parameter)


def local_weights(model: nn.Module) -> list[Tensor]:
    """The weights of a model, of those that it shares with other processes the part that it has."""
    return [
        weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()
    ]

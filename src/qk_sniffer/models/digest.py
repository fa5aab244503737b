"""A digest of a model's weights, the same however many processes share them."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qk_sniffer.models.quantization import tensors_of

_DIGESTED_VALUES = 64


class _Sample(NamedTuple):
    """Some values of a weight.

    Attributes:
        values: (V,) float32 on the host, zeros where another process holds them.
        mesh: The processes that share the weight; None where this one has all of it.
    """

    values: Tensor
    mesh: Any = None


_samples: WeakKeyDictionary[nn.Module, list[_Sample]] = WeakKeyDictionary()


def remember_weights(backbone: nn.Module) -> None:
    """Take the samples of a backbone's weights now, before parts of them are given up."""
    _samples[backbone] = list(_samples_of(backbone))


def weights_digest(backbone: nn.Module) -> str:
    """Names the weights of a model by some values of every one, wherever it came from.

    Those of a quantized layer may be buffers. Of a model that several processes share, all of them
    call this.
    """
    digest = xxhash.xxh3_64()
    for values in _whole(_samples.get(backbone) or list(_samples_of(backbone))):
        digest.update(values.numpy().tobytes())
    packed = [part for p in _plain(backbone) if (parts := tensors_of(p)) != [p] for part in parts]
    for weights in (*packed, *_quantized_weights(backbone)):
        step = max(1, weights.numel() // _DIGESTED_VALUES)
        # Bits, since a float32 would round the eight weights of an int32.
        values = weights.detach().reshape(-1)[::step].contiguous().view(torch.uint8).cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _plain(backbone: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that this process has whole."""
    for parameter in backbone.parameters():
        if not parameter.is_meta and not isinstance(parameter, DTensor):
            yield parameter


def _samples_of(backbone: nn.Module) -> Iterator[_Sample]:
    for parameter in backbone.parameters():
        if parameter.is_meta:
            continue
        if isinstance(parameter, DTensor):
            yield _sample_of_share(parameter)
        elif tensors_of(parameter) == [parameter]:
            step = max(1, parameter.numel() // _DIGESTED_VALUES)
            yield _Sample(parameter.detach().reshape(-1)[::step].float().cpu())


def _sample_of_share(weight: Any) -> _Sample:
    """The sample of a weight that is sharded along one dimension, over a mesh of one."""
    places = torch.arange(0, weight.numel(), max(1, weight.numel() // _DIGESTED_VALUES))
    placement, share = weight.placements[-1], weight.detach().to_local()
    if placement.is_replicate():
        return _Sample(share.reshape(-1)[places.to(share.device)].float().cpu())
    dim, size = placement.dim % weight.ndim, weight.shape[placement.dim]
    inner = weight.shape[dim + 1 :].numel()
    own = _own_indices(size, getattr(placement, "split_factor", 1), weight.device_mesh)
    index = places // inner % size
    number = torch.searchsorted(own, index).clamp(max=len(own) - 1)
    is_own = own[number] == index
    local = (places // (inner * size) * len(own) + number) * inner + places % inner
    values = torch.zeros(len(places))
    values[is_own] = share.reshape(-1)[local[is_own].to(share.device)].float().cpu()
    return _Sample(values, weight.device_mesh)


def _own_indices(size: int, split_factor: int, mesh: Any) -> Tensor:
    """The indices of a sharded dimension that this process has: a chunk of each of some equal parts."""
    number, count = mesh.get_local_rank(), mesh.size()
    parts = [part.chunk(count) for part in torch.arange(size).chunk(split_factor)]
    return torch.cat([chunks[number] for chunks in parts if number < len(chunks)])


def _whole(samples: list[_Sample]) -> list[Tensor]:
    """The values of all samples, with those that other processes hold."""
    shared = [sample for sample in samples if sample.mesh is not None]
    if not shared:
        return [sample.values for sample in samples]
    mesh = shared[0].mesh
    # As integers, so that each is what it was: one process has it and the others have zeros.
    bits = torch.cat([sample.values for sample in shared]).view(torch.int32).to(mesh.device_type)
    dist.all_reduce(bits, group=mesh.get_group())
    sizes = [len(sample.values) for sample in shared]
    found = iter(torch.split(bits.cpu().view(torch.float32), sizes))
    return [sample.values if sample.mesh is None else next(found) for sample in samples]


def _quantized_weights(backbone: nn.Module) -> Iterator[Tensor]:
    """Persistent buffers of the layers that keep packed weights in one, as GPTQ, AWQ and BitNet do.

    Other layers have buffers too, such as the bias of a router, and data roots know their models by a
    digest without these.
    """
    for module in backbone.modules():
        buffers = [
            buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set and not buffer.is_meta
        ]
        if any(_is_packed(buffer) for buffer in buffers):
            yield from buffers


def _is_packed(buffer: Tensor) -> bool:
    """Whether a buffer holds integers or 8-bit numbers; a scalar is a counter."""
    is_packed = not buffer.is_floating_point() or buffer.element_size() == 1
    return is_packed and buffer.dim() > 0 and buffer.dtype != torch.bool

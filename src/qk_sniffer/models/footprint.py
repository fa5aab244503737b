"""The memory that a forward takes beside the weights, told from a model without any."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qk_sniffer.models.passages import read_with_cache
from qk_sniffer.models.share import local_weights
from qk_sniffer.models.skeleton import NoData


@dataclass(frozen=True)
class Footprint:
    """What a forward holds at the moment when it holds the most.

    Attributes:
        n_bytes: All of its tensors, without the weights.
        largest: Bytes of the largest of them.
        is_mask: Whether that is an attention mask, of every query and key.
    """

    n_bytes: int
    largest: int
    is_mask: bool


def forward_footprint(
    backbone: nn.Module, batch_size: int, length: int, prefill_chunk_size: int | None = None
) -> Footprint:
    """The memory that a backbone takes to read a batch, as the allocations of its operations add up.

    Attention by ``scaled_dot_product_attention`` is taken for a kernel that holds no scores, as those
    of CUDA and of the CPU don't; a mask that it is given counts, and once more as numbers where it is
    one of booleans, which these kernels turn into.

    Args:
        backbone: As ``decoder_backbone`` gives it, on the meta device.
        batch_size: Sequences.
        length: Tokens in each.
        prefill_chunk_size: Tokens that are read at a time, with a cache.

    Raises:
        Exception: Of any kind, where the way of the forward depends on values.
    """
    held = _Held(backbone)
    input_ids = torch.zeros((batch_size, length), dtype=torch.int64, device="meta")
    with torch.no_grad(), NoData(), held, _FusedAttention():  # type: ignore[no-untyped-call]
        if prefill_chunk_size is None:
            backbone(input_ids=input_ids, use_cache=False)
        else:
            for _ in read_with_cache(backbone, input_ids, prefill_chunk_size):
                pass
    n_bytes, shape = max(held.at_peak, default=(0, ()))
    return Footprint(held.peak, n_bytes, shape[-2:] == (length, length))


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that live, and remembers those of the moment with the most."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = self.peak = 0
        self.at_peak: list[tuple[int, tuple[int, ...]]] = []
        weights = [*local_weights(backbone), *backbone.buffers()]
        self._known = weakref.WeakSet(weight.untyped_storage() for weight in weights)
        self._living: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._count += 1
                self._living[self._count] = storage.nbytes(), tuple(tensor.shape)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, self._count)
        if self._now > self.peak:
            self.peak, self.at_peak = self._now, list(self._living.values())
        return result

    def _free(self, number: int) -> None:
        self._now -= self._living.pop(number)[0]


class _FusedAttention(TorchFunctionMode):
    """Gives the result of attention without its scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        query, value, mask = given["query"], given["value"], given.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.new_empty(mask.shape, dtype=query.dtype)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

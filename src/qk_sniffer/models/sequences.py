"""What one call of a model reads: which of its places are tokens, and where the model counts them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qk_sniffer.errors import UserError

_COUNT_BY_MASK = {"bloom", "biogpt", "falcon", "opt", "xglm"}
"""Architectures that count positions by the attention mask where no position_ids are given; all others
count every place, padded or not."""


@dataclass(frozen=True, eq=False)
class CallSequences:
    """The sequences of one call, on the host.

    Attributes:
        input_ids: (B, S) int64.
        is_token: (B, S) bool, False for padding.
        positions: (B, S) int64, as the model counts them; of any value where padded.
    """

    input_ids: Tensor
    is_token: Tensor
    positions: Tensor


def sequences_of(decoder: nn.Module, arguments: Mapping[str, Any], past_length: int) -> CallSequences:
    """What a call of a decoder reads.

    Args:
        decoder: The text decoder.
        arguments: Those of its forward, by their names.
        past_length: Places that its cache holds already, padding included.

    Raises:
        UserError: The call has no tokens, or a mask that does not say which of them are padding.
    """
    input_ids = arguments.get("input_ids")
    if not isinstance(input_ids, Tensor):
        raise UserError(
            "sniff: the model was called with inputs_embeds and no input_ids, so its texts are not "
            "known; pass input_ids"
        )
    input_ids = input_ids.detach().to("cpu", torch.int64)
    size, length = input_ids.shape
    mask = _mask(arguments.get("attention_mask"), size, past_length + length)
    is_token = mask[:, past_length:]
    return CallSequences(input_ids, is_token, _positions(decoder, arguments, mask, past_length))


def _mask(mask: Any, size: int, length: int) -> Tensor:
    """(B, P + S) bool: which places of the cache and of the call are tokens."""
    if mask is None:
        return torch.ones(size, length, dtype=torch.bool)
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UserError(
            "sniff: this attention_mask says who attends to whom, and not which tokens are padding; "
            "pass one of one row for each sequence, and generate without a static cache"
        )
    is_token: Tensor = mask.detach().to("cpu") != 0
    if is_token.shape[1] < length:
        raise UserError(
            f"sniff: attention_mask has {is_token.shape[1]} places, and cache and call together have "
            f"{length}; pass one for all of them"
        )
    return is_token[:, :length].expand(size, -1)


def _positions(
    decoder: nn.Module, arguments: Mapping[str, Any], mask: Tensor, past_length: int
) -> Tensor:
    size, length = mask.shape[0], mask.shape[1] - past_length
    position_ids = arguments.get("position_ids")
    if isinstance(position_ids, Tensor):
        # Those of text, height and width have the text's first.
        text = position_ids[0] if position_ids.dim() == 3 else position_ids
        rows: Tensor = text.detach().to("cpu", torch.int64).reshape(-1, length)
        return rows.expand(size, -1)
    if getattr(getattr(decoder, "config", None), "model_type", None) in _COUNT_BY_MASK:
        return (mask.cumsum(1) - 1)[:, past_length:]
    return torch.arange(past_length, past_length + length).expand(size, -1)

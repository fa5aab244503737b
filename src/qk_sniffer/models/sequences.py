"""What one call of a model reads: which of its places are tokens, and where the model counts them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qk_sniffer.errors import UserError
from qk_sniffer.models.attention import cache_of
from qk_sniffer.models.calls import modeling_globals
from qk_sniffer.models.decoder import decoder_modules

_BY_MASK = {"bloom", "opt"}
_BY_TOKENS = "create_position_ids_from_input_ids"


@dataclass(frozen=True, eq=False)
class CallSequences:
    """The sequences of one call, on the host.

    Attributes:
        input_ids: (B, S) int64.
        is_token: (B, P + S) bool, False for padding: the P places of the cache and the S of the call.
        positions: (B, S) int64, as the model counts them; of any value where padded.
        keeps_apart: Whether the model takes tokens whose positions don't follow each other for packed
            texts, which don't attend to each other.
    """

    input_ids: Tensor
    is_token: Tensor
    positions: Tensor
    keeps_apart: bool


def sequences_of(decoder: nn.Module, arguments: Mapping[str, Any], past_length: int) -> CallSequences:
    """What a call of a decoder reads.

    Args:
        decoder: The text decoder.
        arguments: Those of its forward, by their names.
        past_length: Places that its cache holds already, padding included.

    Raises:
        UserError: The call has no tokens, a mask that does not say which of them are padding, or
            padding that leaves their positions unknown.
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
    positions = _positions(decoder, arguments, mask, past_length)
    return CallSequences(input_ids, mask, positions, _keeps_apart(decoder, arguments))


def _keeps_apart(decoder: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether transformers looks for packed texts: in a call without mask and cache."""
    config = getattr(decoder, "config", None)
    use_cache = arguments.get("use_cache")
    use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
    return (
        arguments.get("attention_mask") is None
        and not use_cache
        and cache_of(arguments) is None
        and "create_causal_mask" in modeling_globals(type(decoder))
    )


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
    counts = _counts_of(decoder)
    if counts == "tokens" and not bool(mask[:, 0].all()):
        raise UserError(
            f"sniff: {type(decoder).__name__} counts positions by its padding token, so those of a "
            "text that is padded on the left are not known; pad on the right, or pass position_ids"
        )
    if counts == "mask":
        return (mask.cumsum(1) - 1)[:, past_length:]
    return torch.arange(past_length, past_length + length).expand(size, -1)


def _counts_of(decoder: nn.Module) -> Literal["places", "mask", "tokens"]:
    """What a decoder counts where no position_ids are given; most count every place."""
    config, names = getattr(decoder, "config", None), modeling_globals(type(decoder))
    kinds = {type(decoder), *decoder_modules(decoder).kinds}
    if any(hasattr(kind, _BY_TOKENS) for kind in kinds) or _BY_TOKENS in names:
        return "tokens"
    by_mask = getattr(config, "model_type", None) in _BY_MASK
    return "mask" if by_mask or getattr(config, "alibi", False) else "places"

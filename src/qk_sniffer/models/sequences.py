"""What one call of a model reads: which of its places are tokens, and where the model counts them."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qk_sniffer.errors import UserError
from qk_sniffer.models.attention import cache_of, text_decoder
from qk_sniffer.models.calls import modeling_globals
from qk_sniffer.models.decoder import decoder_modules
from qk_sniffer.models.probe import quietly

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


def sequences_of(
    decoder: nn.Module, arguments: Mapping[str, Any], past_length: int, *, can_pack: bool
) -> CallSequences:
    """What a call of a decoder reads.

    Args:
        decoder: The text decoder.
        arguments: Those of its forward, by their names.
        past_length: Places that its cache holds already, padding included.
        can_pack: Whether the model keeps packed texts apart, as ``keeps_texts_apart`` says.

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
    return CallSequences(input_ids, mask, positions, can_pack and _may_pack(decoder, arguments))


def _may_pack(decoder: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether transformers looks for packed texts: in a call without mask and cache."""
    config = getattr(decoder, "config", None)
    use_cache = arguments.get("use_cache")
    use_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
    return arguments.get("attention_mask") is None and not use_cache and cache_of(arguments) is None


_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def keeps_texts_apart(backbone: nn.Module) -> bool:
    """Whether tokens whose positions begin anew don't attend to those before, without mask and cache.

    Seen in two forwards of a few tokens, where the decoder makes such masks at all: some don't tell
    what makes the mask of the positions. The answer is kept for as long as the backbone lives.

    Args:
        backbone: As ``decoder_backbone`` gives it.
    """
    if backbone not in _apart:
        makes_mask = "create_causal_mask" in modeling_globals(type(text_decoder(backbone)))
        with quietly(backbone):
            _apart[backbone] = makes_mask and _reads_apart(backbone)
    return _apart[backbone]


@torch.no_grad()
def _reads_apart(backbone: nn.Module) -> bool:
    """Whether a packed text is read as it is behind another one."""
    device = next(backbone.parameters()).device
    positions = torch.arange(5, device=device).repeat(2)[None]
    outputs = []
    for token in (4, 6):
        input_ids = torch.full((1, 10), token, device=device)
        input_ids[0, 5:] = torch.tensor([5, 4, 5, 5, 4], device=device)
        try:
            output = backbone(input_ids=input_ids, position_ids=positions, use_cache=False)
        # A decoder may take no positions, or none that begin anew.
        except (TypeError, ValueError, RuntimeError):
            return False
        outputs.append(output[0][:, 5:].float())
    return bool((outputs[0] - outputs[1]).norm() <= 1e-3 * outputs[0].norm())


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
    # MPT passes over those that it is given.
    takes_positions = "position_ids" in signature(type(decoder).forward).parameters
    if takes_positions and isinstance(position_ids, Tensor):
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

"""RoPE whose frequencies depend on how many tokens a model reads at once, as longrope and dynamic NTK.

The rotary module of such a model picks its frequencies by the largest position of a forward, and one
with dynamic NTK keeps those of a longer text. A text would have other vectors in a batch with a
longer one, in passages, or after a longer one. Here it has those of a fresh model that reads it whole.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qk_sniffer.errors import UserError
from qk_sniffer.models.attention import text_decoder

_LONGER_THAN_ANY_TEXT = 2**24
"""Tokens; every position below is a whole number in float32."""

_Rotary = tuple[nn.Module, dict[str, str]]
"""A module that gives cosines and sines, and what else it is called with."""

_dependent: WeakKeyDictionary[nn.Module, list[_Rotary]] = WeakKeyDictionary()


def spans_of_like_frequencies(backbone: nn.Module, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Adjacent texts that a model may read together, since it reads each with the same frequencies.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        lengths: Tokens in each text.

    Returns:
        Number of the first text and of the one after the last, for each span.
    """
    if not depends_on_length(backbone):
        return [(0, len(lengths))]
    signatures = {length: _signature(_dependent[backbone], length) for length in set(lengths)}
    starts = [
        number
        for number in range(len(lengths))
        if number == 0 or signatures[lengths[number]] != signatures[lengths[number - 1]]
    ]
    return list(zip(starts, [*starts[1:], len(lengths)], strict=True))


def depends_on_length(backbone: nn.Module) -> bool:
    """Whether a long text is read with other frequencies than a short one.

    Args:
        backbone: As ``decoder_backbone`` gives it; the answer is kept for as long as it lives.
    """
    if backbone not in _dependent:
        _dependent[backbone] = [
            rotary
            for rotary in _rotary_modules(backbone)
            if _signature([rotary], 2) != _signature([rotary], _LONGER_THAN_ANY_TEXT)
        ]
    return bool(_dependent[backbone])


def begin_batch_of_like_frequencies(backbone: nn.Module, lengths: Sequence[int]) -> None:
    """Let a model begin a batch as a fresh one does, and see that its texts can share a forward.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        lengths: Tokens in each text, and the width that they are padded to.

    Raises:
        UserError: They would be read with other frequencies than alone.
    """
    spans = spans_of_like_frequencies(backbone, lengths)
    if len(spans) > 1:
        raise UserError(
            f"input_ids: a batch has texts of {lengths[0]:,} and {lengths[spans[1][0]]:,} tokens, "
            "padding included, and this model's RoPE has other frequencies for the one than for the "
            "other; batch texts of one length, or read with SnifferModule, which takes them apart"
        )
    forget_lengths(backbone)


def forget_lengths(backbone: nn.Module) -> None:
    """Let a model read its next text as a fresh one does, whatever it has read before.

    Args:
        backbone: As ``decoder_backbone`` gives it.
    """
    if depends_on_length(backbone):
        for module, arguments in _dependent[backbone]:
            _renew(module, arguments)


@contextmanager
def frequencies_for(backbone: nn.Module, length: int) -> Iterator[None]:
    """Within a block, rotate as a fresh model does that reads so many tokens in one forward.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        length: Tokens in the whole text, however many a forward in the block reads.
    """
    if not depends_on_length(backbone):
        yield
        return
    with ExitStack() as stack:
        for module, arguments in _dependent[backbone]:
            _renew(module, arguments)
        for module in {module for module, _ in _dependent[backbone]}:
            for hook in _tell(module, length):
                stack.callback(hook.remove)
        yield


def _rotary_modules(backbone: nn.Module) -> Iterator[_Rotary]:
    for module in text_decoder(backbone).modules():
        rope_type: Any = getattr(module, "rope_type", None)
        if rope_type is None or "position_ids" not in inspect.signature(module.forward).parameters:
            continue
        if isinstance(rope_type, dict):
            yield from ((module, {"layer_type": layer_type}) for layer_type in rope_type)
        else:
            yield module, {}


def _renew(module: nn.Module, arguments: dict[str, str]) -> None:
    """Let a module forget what it has read: a text of one token takes it back to where it began."""
    _rotations(module, arguments, [0])


def _signature(modules: Sequence[_Rotary], length: int) -> bytes:
    """What tells apart the frequencies, and their scale, with which a text of some length is read."""
    parts = []
    for module, arguments in modules:
        _renew(module, arguments)
        # The angles of position 1 are the frequencies.
        for values in _rotations(module, arguments, [1, max(1, length - 1)]):
            parts.append(values[..., 0, :].cpu().numpy().tobytes())
    return b"".join(parts)


@torch.no_grad()
def _rotations(module: nn.Module, arguments: dict[str, str], positions: list[int]) -> list[Tensor]:
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    like = torch.zeros(1, len(positions), 1, device=device)
    result = module(like, position_ids=torch.tensor([positions], device=device), **arguments)
    return [result] if isinstance(result, Tensor) else list(result)


def _tell(module: nn.Module, length: int) -> Iterator[RemovableHandle]:
    """Let a module see the last position of the whole text beside those of each call."""

    def with_last(module: nn.Module, args: Any, kwargs: Any) -> Any:
        named = "position_ids" in kwargs
        positions = kwargs["position_ids"] if named else args[1]
        last = positions.new_full((*positions.shape[:-1], 1), length - 1)
        positions = torch.cat([positions, last], dim=-1)
        if named:
            return args, kwargs | {"position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def without_last(module: nn.Module, args: Any, result: Any) -> Any:
        if isinstance(result, Tensor):
            return result[..., :-1, :]
        return tuple(values[..., :-1, :] for values in result)

    yield module.register_forward_pre_hook(with_last, with_kwargs=True)
    yield module.register_forward_hook(without_last)

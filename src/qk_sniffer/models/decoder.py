"""The modules of a decoder, found once: a forward has no time to walk them."""

import re
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

_CROSS_ATTENTION = re.compile(r"cross|encoder_?attn", re.IGNORECASE)
_LAYER_NAME = re.compile(r"\D*(\d+)")


class DecoderModules:
    """The modules inside a text decoder.

    Args:
        decoder: As ``text_decoder`` gives it.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.layers = [
            (int(number[1]), module)
            for name, module in decoder.named_modules(remove_duplicate=False)
            if (number := _LAYER_NAME.fullmatch(name))
        ]
        """Its layers, by their number; a module that is used as several is there several times."""
        # Without the decoder: what is kept of it must not keep it alive.
        named = [(name, module) for name, module in decoder.named_modules() if module is not decoder]
        self.all = frozenset(module for _, module in named)
        """Every module."""
        self.kinds = frozenset(type(module) for module in self.all)
        """Their classes."""
        self.cross_attention = frozenset(
            module
            for name, module in named
            if _CROSS_ATTENTION.search(name) or _CROSS_ATTENTION.search(type(module).__name__)
        )
        """Those that attend to something else than the text, or are inside one that does."""
        self._layer_of: dict[nn.Module, int] = {}
        self._has_shared = False

    @property
    def layer_of(self) -> Mapping[nn.Module, int]:
        """The layer of each module that was seen to attend; empty where one attends in several."""
        return {} if self._has_shared else self._layer_of

    def attends(self, module: nn.Module, layer_idx: int) -> None:
        """Note the layer in which a module attends."""
        self._has_shared |= self._layer_of.setdefault(module, layer_idx) != layer_idx


def forget_modules(decoder: nn.Module) -> None:
    """Look for the modules of a decoder anew, where it has changed."""
    _found.pop(decoder, None)


_found: WeakKeyDictionary[nn.Module, DecoderModules] = WeakKeyDictionary()


def decoder_modules(decoder: nn.Module) -> DecoderModules:
    """The modules inside a text decoder, kept for as long as it lives.

    Args:
        decoder: As ``text_decoder`` gives it.
    """
    if decoder not in _found:
        _found[decoder] = DecoderModules(decoder)
    return _found[decoder]

"""Vectors before the rotary embedding, seen by wrapping the modeling file's own rotary function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from qk_sniffer.errors import UserError

_ROTARY_FUNCTION = "apply_rotary_pos_emb"


class RotaryTrace:
    """The rotations since the last attention call, as (query, key) before and after each."""

    def __init__(self) -> None:
        self._rotations: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []

    def wrap(self, rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        """A function that does what ``rotate`` does and notes its arguments and results."""

        @wraps(rotate)
        def noted(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rotated = rotate(q, k, *args, **kwargs)
            self._rotations.append(((q, k), rotated))
            return rotated

        return noted

    def unrotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What ``query`` and ``key`` of an attention call were before their rotation.

        A layer that rotates nothing gets its own tensors back.

        Raises:
            UserError: The layer changed the vectors again after rotating them.
        """
        rotations, self._rotations = self._rotations, []
        if not rotations:
            return query, key
        for before, (rotated_query, rotated_key) in rotations:
            if rotated_query is query and rotated_key is key:
                return before
        raise _unsupported("changes queries or keys after their rotation")


@contextmanager
def trace_rotary(backbone: nn.Module) -> Iterator[RotaryTrace]:
    """Wrap the rotary function of the backbone's modeling files for the length of a block.

    Raises:
        UserError: The backbone has rotary embeddings and no function that could be wrapped.
    """
    names = {type(module).__module__ for module in backbone.modules()}
    files = [m for name in sorted(names) if hasattr(m := sys.modules[name], _ROTARY_FUNCTION)]
    if not files and any("Rotary" in type(module).__name__ for module in backbone.modules()):
        raise _unsupported(f"has no function {_ROTARY_FUNCTION}")
    trace = RotaryTrace()
    originals = [(file, getattr(file, _ROTARY_FUNCTION)) for file in files]
    for file, rotate in originals:
        setattr(file, _ROTARY_FUNCTION, trace.wrap(rotate))
    try:
        yield trace
    finally:
        for file, rotate in originals:
            setattr(file, _ROTARY_FUNCTION, rotate)


def _unsupported(what: str) -> UserError:
    return UserError(
        f"sniffer.capture.capture_pre_rope: this architecture {what}, so its vectors before RoPE "
        "can't be told; set it to false"
    )

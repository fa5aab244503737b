"""Functions of transformers that are wrapped for a while, by one or several at a time.

Whoever wraps one may come and go in any order, also in threads: the last that goes leaves the owner as
the first has found it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

Wrap = Callable[[Any], Any]
"""Takes a function, and gives one to be called in its place."""


@dataclass
class _Wrapped:
    """What a name of an owner held, and what it is wrapped in, from the inside out."""

    original: Any
    is_own: bool
    wraps: list[Wrap] = field(default_factory=list)


_lock = threading.Lock()
_wrapped: dict[tuple[int, str], _Wrapped] = {}


@contextmanager
def wrapped(owner: Any, name: str, wrap: Wrap) -> Iterator[None]:
    """Wrap a function of a class, or of the names of a module, within a block.

    Args:
        owner: The class, or the dictionary of names.
        name: The function's.
        wrap: Takes the function, as other blocks may have wrapped it already.
    """
    key = (id(owner), name)
    with _lock:
        if key not in _wrapped:
            names = owner if isinstance(owner, dict) else vars(owner)
            original = names[name] if name in names else getattr(owner, name)
            _wrapped[key] = _Wrapped(original, name in names)
        entry = _wrapped[key]
        entry.wraps.append(wrap)
        _put(owner, name, entry)
    try:
        yield
    finally:
        with _lock:
            # By identity: functions of one text are equal to no other.
            entry.wraps.remove(wrap)
            _put(owner, name, entry)
            if not entry.wraps:
                del _wrapped[key]


def _put(owner: Any, name: str, entry: _Wrapped) -> None:
    if not entry.wraps and not entry.is_own:
        delattr(owner, name)
        return
    is_static = isinstance(entry.original, staticmethod)
    function = entry.original.__func__ if is_static else entry.original
    value = reduce(lambda inner, wrap: wrap(inner), entry.wraps, function)
    if is_static:
        value = staticmethod(value) if entry.wraps else entry.original
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)

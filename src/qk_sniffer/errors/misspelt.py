"""What a misspelt name was meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that one stands for, None where none is like it.

    Args:
        name: A name that is not known; dots divide one of the config, such as ``data.btach_size``.
        known: The names that are.
    """
    known = list(known)
    section, _, last = name.rpartition(".")
    # Beside it first: whole names are alike by their section alone.
    beside = {_last(other): other for other in known if other.rpartition(".")[0] == section}
    if close := get_close_matches(last, beside, 1):
        return beside[close[0]]
    alike = get_close_matches(last, {_last(other) for other in known}, 1, 0.8)
    elsewhere = [other for other in known if _last(other) in alike]
    return next(iter(get_close_matches(name, elsewhere, 1, 0)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a name that is not known: the one that is like it, or else another remedy."""
    meant = nearest(name, known)
    return otherwise if meant is None else f"did you mean {meant}?"


def _last(name: str) -> str:
    return name.rpartition(".")[2]

"""Philox4x32-10, the counter-based random number generator, on NumPy arrays.

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC11. A draw is a pure function of its counter and key, so it depends on no state, no
order of calls and no device count.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

WORD = 0xFFFFFFFF
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_SHIFT, _MASK = np.uint64(32), np.uint64(WORD)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = range(10)
_COUNTERS_AT_ONCE = 2**14
"""So many words and their products stay in the processor's cache."""

Words = npt.NDArray[np.uint64]


def philox4x32(counter: Sequence[Any], key: int) -> Words:
    """Four independent 32-bit words for each counter.

    Args:
        counter: Four 32-bit words, least significant first: integers or arrays of integers in
            [0, 2^32) that broadcast against each other.
        key: 64-bit integer.

    Returns:
        (4, ...), the broadcast shape behind the words, each uniform on [0, 2^32): the rounds mix
        every word of the counter into each.
    """
    words = np.empty((4, *np.broadcast_shapes(*map(np.shape, counter))), np.uint64)
    for number, word in enumerate(counter):
        words[number] = word
    mix(words.reshape(4, -1), key)
    return words


def mix(words: Words, key: int) -> None:
    """Put the words that ``philox4x32`` gives for some counters in their place: (4, n)."""
    rounds = _round_keys(key)
    for start in range(0, words.shape[1], _COUNTERS_AT_ONCE):
        _mix(words[:, start : start + _COUNTERS_AT_ONCE], rounds)


@lru_cache(maxsize=16)
def _round_keys(key: int) -> Words:
    """What each round adds to each half of the words: (rounds, 2, 1)."""
    halves = key & WORD, key >> 32 & WORD
    rounds = [
        [[half + weyl * n & WORD] for half, weyl in zip(halves, _WEYL, strict=True)] for n in _ROUNDS
    ]
    return np.array(rounds, np.uint64)


def _mix(words: Words, rounds: Words) -> None:
    product = np.empty_like(words[:2])
    kept, multiplied = words[1::2], words[::2]
    for keys in rounds:
        np.multiply(multiplied, _MULTIPLIERS, out=product)
        # Each half of a product goes to the other pair of words.
        np.right_shift(product[::-1], _SHIFT, out=multiplied)
        np.bitwise_xor(multiplied, kept, out=multiplied)
        np.bitwise_xor(multiplied, keys, out=multiplied)
        np.bitwise_and(product[::-1], _MASK, out=kept)

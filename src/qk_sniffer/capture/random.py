"""Philox4x32-10, the counter-based random number generator, on torch tensors.

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC11. A draw is a pure function of its counter and key, so it depends on no state, no
order of calls and no device count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor | int], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words for each counter.

    Args:
        counter: Four 32-bit words, least significant first: integers or int64 tensors in
            [0, 2^32) that broadcast against each other.
        key: 64-bit integer.

    Returns:
        Four int64 tensors of the broadcast shape, each uniform on [0, 2^32): the rounds mix
        every word of the counter into each.
    """
    words = [torch.as_tensor(word, dtype=torch.int64) for word in counter]
    c0, c1, c2, c3 = words
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(_ROUNDS):
        # A product of two 32-bit words wraps into int64's sign bit; masking restores each half.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ k0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3

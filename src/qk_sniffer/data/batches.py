"""Which texts are read together, in which order, and by which process of a run."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from qk_sniffer.processes import Dealer

WINDOW_BATCHES = 16
"""Batches of the largest size that a window has texts for: enough to fill them with texts of like
length, few enough for a stream to wait for, and a bound on what changes when texts are added."""

Lengths = npt.NDArray[np.int64]
Batch = npt.NDArray[np.int64]
"""Row numbers of the texts that are read together."""


def plan_batches(lengths: Lengths, batch_size: int, max_tokens_per_batch: int | None) -> list[Batch]:
    """The batches of some texts, which depend on nothing but the arguments.

    Without a token budget texts are taken in order. With one they are sorted by length, a window of
    them at a time and longest first, and a batch holds as many as fit: its size times its longest text
    is at most the budget, and a text beyond the budget is a batch of its own.

    Args:
        lengths: (N,) tokens in each text.
        batch_size: Most texts in a batch.
        max_tokens_per_batch: The budget, padding included; None for none.
    """
    if max_tokens_per_batch is None:
        return [
            np.arange(first, min(first + batch_size, lengths.size))
            for first in range(0, lengths.size, batch_size)
        ]
    batches: list[Batch] = []
    window = Window(batch_size, max_tokens_per_batch)
    first = 0
    for stop, length in enumerate(lengths.tolist(), start=1):
        if window.add(length) or stop == lengths.size:
            order = first + np.argsort(-lengths[first:stop], kind="stable")
            while order.size:
                longest = max(1, int(lengths[order[0]]))
                size = max(1, min(batch_size, max_tokens_per_batch // longest))
                batches.append(order[:size])
                order = order[size:]
            first = stop
    return batches


class Window:
    """Tells where one window ends and the next begins, text by text.

    Args:
        batch_size: Most texts in a batch.
        max_tokens_per_batch: Most tokens in a batch.
    """

    def __init__(self, batch_size: int, max_tokens_per_batch: int) -> None:
        self._most_texts = WINDOW_BATCHES * batch_size
        self._most_tokens = WINDOW_BATCHES * max_tokens_per_batch
        self._n_texts = self._n_tokens = 0

    def add(self, length: int) -> bool:
        """Count a text of so many tokens, and say whether the window ends with it."""
        self._n_texts += 1
        self._n_tokens += length
        if self._n_texts < self._most_texts and self._n_tokens < self._most_tokens:
            return False
        self._n_texts = self._n_tokens = 0
        return True


def rest_of(batches: Iterable[Batch], is_left: npt.NDArray[np.bool_]) -> list[Batch]:
    """The batches without the texts that are not left, so that the others keep their company."""
    return [rest for batch in batches if (rest := batch[is_left[batch]]).size]


def longest_first(batches: Sequence[Batch], lengths: Lengths) -> list[Batch]:
    """The batches by their longest text, so that a batch too large for a device is met at once."""
    return sorted(batches, key=lambda batch: -int(lengths[batch].max()))


def padded_tokens(batch: Batch, lengths: Lengths) -> int:
    """Tokens that a model reads of a batch, padding included."""
    return batch.size * max(1, int(lengths[batch].max()))


def share_of(batches: Sequence[Batch], lengths: Lengths, rank: int, size: int) -> list[Batch]:
    """The batches that fall to one of several processes, in order.

    The largest are dealt first, so that the last of them to end ends not much later than the others.
    """
    dealer = Dealer(size)
    costs = np.array([padded_tokens(batch, lengths) for batch in batches], np.int64)
    owners = np.empty(len(batches), np.int64)
    for number in np.argsort(-costs, kind="stable").tolist():
        owners[number] = dealer.deal(int(costs[number]))
    return [batch for batch, owner in zip(batches, owners.tolist(), strict=True) if owner == rank]

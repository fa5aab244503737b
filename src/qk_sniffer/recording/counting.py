"""Counting: the moments of one process's texts, and when they are saved."""

import time

import numpy as np
import numpy.typing as npt

from qk_sniffer.capture import MomentSums, Sampler
from qk_sniffer.config import MomentsConfig
from qk_sniffer.ids import ExampleFilter
from qk_sniffer.moments import MomentState
from qk_sniffer.recording.own_streams import OwnStreams
from qk_sniffer.storage import JournalWriter

SAVED_BYTES_PER_SECOND = 20e6
"""What saving may write on average: the work that a death can cost, against wear of the disk. All sums
are written each time."""


class Counting:
    """Sums moments and saves them in the journal, each text with its batch or not at all.

    Args:
        config: Which moments.
        own: The captured heads of each layer and part.
        sampler: Gives the buckets.
        journal: Where they are saved.
        is_left: The texts that no earlier run has counted.
    """

    def __init__(
        self,
        config: MomentsConfig,
        own: OwnStreams,
        sampler: Sampler,
        journal: JournalWriter,
        is_left: ExampleFilter,
    ) -> None:
        buckets = sampler if config.by_bucket else None
        streams = own.with_served_keys() if config.cross else own.streams
        self.sums = MomentSums(streams, buckets, pre_rope=config.pre_rope, cross=config.cross)
        self._own = own
        self._journal = journal
        self._is_left = is_left
        self._example_ids = np.empty(0, np.int32)
        self._n_saved = 0
        self._due = time.monotonic() + journal.sync_seconds

    def lengths(self, example_ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> list[int]:
        """Tokens of each text of a batch that count: none of those that are counted already."""
        return self._is_left.tokens(example_ids, lengths)

    def end_batch(self, example_ids: npt.NDArray[np.int32]) -> None:
        """Note the texts of a batch that the sums hold now."""
        new = example_ids[self._is_left(example_ids)]
        self._example_ids = np.concatenate([self._example_ids, new])

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return bool(time.monotonic() >= self._due)

    def save(self) -> None:
        """Save what the journal does not have, without waiting for the disk."""
        # A batch that failed in the middle is captured anew, and what of it was summed must not stay.
        if len(self._example_ids) == self._n_saved or not self.sums.is_whole:
            return
        state = MomentState(self._own.as_whole(self.sums.tables()), np.sort(self._example_ids))
        self._journal.save_moments(state)
        self._n_saved = len(self._example_ids)
        seconds = max(self._journal.sync_seconds, state.n_bytes / SAVED_BYTES_PER_SECOND)
        self._due = time.monotonic() + seconds

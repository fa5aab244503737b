"""What the moments of a run take: rows of their files, and memory of each process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qk_sniffer.capture import MOMENTS_BYTES
from qk_sniffer.config import MomentsConfig
from qk_sniffer.kinds import KINDS
from qk_sniffer.storage import moments_bytes, most_state_files


@dataclass(frozen=True)
class Moments:
    """Sums over all tokens, in float64, of which each process has those of its texts and heads.

    Attributes:
        config: What is summed.
        streams: The heads of each layer and kind, and their head_dim.
        shares: Those of each of the processes that share a model.
        n_buckets: Buckets that the longest text reaches.
    """

    config: MomentsConfig
    streams: Sequence[Mapping[str, Any]]
    shares: Sequence[Sequence[Mapping[str, Any]]]
    n_buckets: int

    @property
    def rows(self) -> int:
        """Rows of all files: one a head, bucket and stage."""
        n_stages = {kind: 2 if kind in "qk" and self.config.pre_rope else 1 for kind in KINDS}
        heads = sum(len(s["heads"]) * n_stages[s["kind"]] for s in self.streams if s["kind"] in KINDS)
        return heads * (self.n_buckets if self.config.by_bucket else 1)

    @property
    def n_bytes(self) -> int:
        """What they take as files."""
        return self._bytes_of(self.streams)

    @property
    def _sums_bytes(self) -> int:
        """What the sums of a process take, of the one that has most."""
        return max(map(self._bytes_of, self.shares))

    def _bytes_of(self, streams: Sequence[Mapping[str, Any]]) -> int:
        return moments_bytes(streams, {"moments": self.config.as_settings()}, self.n_buckets)

    @property
    def host_bytes(self) -> int:
        """The most that they take of the host's memory: copied from a device, and put together."""
        return 2 * self._sums_bytes

    @property
    def journal_bytes(self) -> int:
        """The most that the processes of a model have in the journal, while new sums replace others."""
        return most_state_files(len(self.shares)) * self.n_bytes

    @property
    def device_bytes(self) -> int:
        """The most that a device holds: the sums, those of a batch, and vectors that are summed."""
        # Vectors of texts of several lengths are gathered before they are put about their mean.
        return 2 * self._sums_bytes + 2 * MOMENTS_BYTES

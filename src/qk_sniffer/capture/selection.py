"""Which rows are kept: those that a sampler draws, and positions that are kept whatever it draws."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture.random import WORD
from qk_sniffer.capture.sampling import (
    NoneSampler,
    PositionsSampler,
    Sampler,
    build_sampler,
    draw_positions,
    every_row,
    longest_of,
)
from qk_sniffer.kinds import Part, random_stream, random_streams

Integers = npt.NDArray[np.int64]


class Listed(NamedTuple):
    """Positions that are listed for each of some texts, one text behind the other.

    Those of a text ascend, each once; a text may end before some of them.
    """

    sizes: Integers
    """(S,) how many each text has."""
    positions: Integers
    """(sum of sizes,)"""

    @classmethod
    def of(cls, lists: Sequence[npt.NDArray[np.integer]]) -> "Listed":
        """Those of S texts, from an array of each."""
        sizes = np.array([positions.size for positions in lists], np.int64)
        return cls(sizes, np.concatenate([np.empty(0, np.int64), *lists]))

    def part(self, start: int, stop: int) -> "Listed":
        """Those of some of the texts."""
        ends = np.concatenate([[0], self.sizes.cumsum()])
        return Listed(self.sizes[start:stop], self.positions[ends[start] : ends[stop]])


@dataclass(frozen=True, eq=False)
class Selection:
    """What decides which rows are kept of a text.

    Attributes:
        sampler: Gives buckets, and draws positions.
        seed: 64-bit seed of its random stream.
        keep_first: Number of first positions that are kept besides.
        positions: (P,) ascending, kept of every text besides; None for none.
        shared: Whether all layers and parts keep the same rows.
    """

    sampler: Sampler
    seed: int = 0
    keep_first: int = 0
    positions: Integers | None = None
    shared: bool = False

    @classmethod
    def of(cls, capture: Mapping[str, Any]) -> "Selection":
        """The one that a config names.

        Args:
            capture: The section capture, as a mapping; fields of later versions may be missing.

        Raises:
            UserError: There is no such sampler.
        """
        sampler = capture["sampler"]
        positions = sampler.get("positions")
        return cls(
            build_sampler(sampler["type"], sampler["base_rate"], capture["min_bucket_size"]),
            sampler["seed"],
            sampler.get("keep_first", 0),
            None if positions is None else np.unique(np.asarray(positions, np.int64)),
            sampler.get("shared", False),
        )

    @property
    def keeps_rows(self) -> bool:
        """Whether it keeps any; otherwise moments alone are captured."""
        return not isinstance(self.sampler, NoneSampler)

    @property
    def needs_lists(self) -> bool:
        """Whether the positions to keep come with each text."""
        return isinstance(self.sampler, PositionsSampler) and self.positions is None

    def random_stream(self, layer_idx: int, part: Part) -> int:
        """What names the random stream that draws the rows of a layer and part."""
        return 0 if self.shared else random_stream(layer_idx, part)

    def random_streams(self, streams: Iterable[tuple[int, Part]]) -> list[int]:
        """What names the random streams of some layers and parts, each once, in their order."""
        return [0] if self.shared else random_streams(streams)

    def count_draws(self, streams: Iterable[tuple[int, Part]], lengths: Tensor) -> int:
        """How many draws some layers and parts make; without chance in it, one is enough.

        Args:
            streams: The layers and parts.
            lengths: (S,) int64, tokens in each text.
        """
        n_streams = len(self.random_streams(streams))
        segments = self.sampler.segments(longest_of(lengths))
        is_certain = all(segment.probability >= 1 for segment in segments)
        return min(1, n_streams) if is_certain else n_streams

    def count_buckets(self, length: int) -> int:
        """How many buckets the positions of a text fall into.

        Args:
            length: Its tokens.
        """
        return len(np.unique(self.sampler.buckets(torch.arange(length)).numpy()))

    def draw(
        self, stream_ids: Tensor, example_ids: Tensor, lengths: Tensor, listed: Listed | None = None
    ) -> tuple[Tensor, Tensor]:
        """The kept positions of many texts at once.

        Args:
            stream_ids: (S,) int64, as for ``draw_positions``.
            example_ids: (S,) int64, the int32 ids of the texts.
            lengths: (S,) int64, tokens in each text.
            listed: Positions to keep of each text, where they come with it.

        Returns:
            Two int64 tensors (K,): the index into S and the position of each kept row, sorted by both.
        """
        sequences, positions = draw_positions(self.sampler, self.seed, stream_ids, example_ids, lengths)
        besides = [*self._first(lengths), *self._listed(lengths, listed)]
        if not besides:
            return sequences, positions
        drawn = ((sequences << 32) + positions).numpy()
        # A stable sort merges what is in order already.
        rows = np.sort(np.concatenate([drawn, *besides]), kind="stable")
        rows = rows[np.diff(rows, prepend=-1) > 0]
        return torch.from_numpy(rows >> 32), torch.from_numpy(rows & WORD)

    def keep_probabilities(self, positions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """How likely each of some positions is to be kept of a text that has it: (K,) float64.

        Those that come with each text are not known here, and have 0.

        Args:
            positions: (K,) integers.
        """
        found = np.zeros(positions.shape)
        if segments := self.sampler.segments(int(positions.max(initial=-1)) + 1):
            starts, stops, probabilities = (np.array(column) for column in zip(*segments, strict=True))
            numbers = np.searchsorted(starts, positions, "right") - 1
            inside = (numbers >= 0) & (positions < stops[numbers])
            found[inside] = probabilities[numbers[inside]].clip(max=1)
        found[positions < self.keep_first] = 1
        if self.positions is not None:
            found[np.isin(positions, self.positions)] = 1
        return found

    def expected_rows(self, lengths: Tensor, listed: Listed | None = None) -> npt.NDArray[np.float64]:
        """Rows that a layer and part keeps of each of some texts, on average: (S,) float64.

        Args:
            lengths: (S,) int64, tokens in each text.
            listed: Positions to keep of each text, where they come with it.
        """
        kept = self.keep_probabilities(np.arange(longest_of(lengths))).cumsum()
        rows: npt.NDArray[np.float64] = np.concatenate([[0.0], kept])[lengths.numpy()]
        if listed is not None:
            texts, _ = self._behind_the_first(lengths, listed)
            rows = rows + np.bincount(texts, minlength=rows.size)
        return rows

    def expected_rows_by_bucket(
        self, lengths: Tensor, listed: Listed | None = None
    ) -> dict[int, float]:
        """The same of all texts, in each bucket."""
        longest = longest_of(lengths)
        # Texts that have a token at each position.
        reaching = lengths.numel() - torch.bincount(lengths, minlength=longest).cumsum(0)[:longest]
        rows = self.keep_probabilities(np.arange(longest)) * reaching.numpy()
        if listed is not None:
            _, positions = self._behind_the_first(lengths, listed)
            rows += np.bincount(positions, minlength=longest)
        buckets, places = torch.unique(self.sampler.buckets(torch.arange(longest)), return_inverse=True)
        sums = np.bincount(places.numpy(), rows, minlength=buckets.numel())
        return dict(zip(buckets.tolist(), sums.tolist(), strict=True))

    def _first(self, lengths: Tensor) -> list[Integers]:
        """The first rows of each text, where they are kept."""
        if self.keep_first == 0:
            return []
        return [every_row(0, lengths.numpy().clip(max=self.keep_first))]

    def _listed(self, lengths: Tensor, listed: Listed | None) -> list[Integers]:
        """The rows that are listed, where any are."""
        if self.positions is not None:
            n_texts = lengths.numel()
            sizes = np.full(n_texts, self.positions.size)
            listed = Listed(sizes, np.tile(self.positions, n_texts))
        if listed is None:
            return []
        texts, positions = _within(lengths, listed)
        return [(texts << 32) + positions]

    def _behind_the_first(self, lengths: Tensor, listed: Listed) -> tuple[Integers, Integers]:
        """Text and position of the rows that come with a text, but those that it keeps anyway."""
        texts, positions = _within(lengths, listed)
        is_behind = positions >= self.keep_first
        return texts[is_behind], positions[is_behind]


def _within(lengths: Tensor, listed: Listed) -> tuple[Integers, Integers]:
    """The texts and positions of what is listed, up to the ends of the texts."""
    texts = np.repeat(np.arange(listed.sizes.size), listed.sizes)
    has_it = listed.positions < lengths.numpy()[texts]
    return texts[has_it], listed.positions[has_it]

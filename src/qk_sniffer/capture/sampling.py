"""Samplers: which positions of a sequence are kept, and the random stream that decides.

A sampler cuts the positions into segments of one keep probability. Inside a segment the gaps between
kept positions are geometric, so the cost of a draw grows with the rows kept and not with the length
of the sequence. Every gap comes from one Philox call on (draw, segment, layer and kind, example), in
integers throughout: the same rows on every machine, for every batch size, order and device count.
A longer sequence keeps the same positions as its prefix.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture.random import WORD, Words, mix
from qk_sniffer.errors import UserError
from qk_sniffer.misspelt import did_you_mean

Rows = npt.NDArray[np.int64]
"""Kept rows, each (sequence << 32) + position."""

MAX_POSITIONS = 2**31
_DRAWS_AT_ONCE = 2**20
_CELL_BITS = 14
_CELL_SHIFT = 32 - _CELL_BITS


class Segment(NamedTuple):
    """Positions from ``start`` up to but not including ``stop``, each kept with ``probability``."""

    start: int
    stop: int
    probability: float


class Sampler(ABC):
    """Decides bucket and keep probability of every position.

    A subclass of your own is named by its class path in ``sampler.type`` and is built with the two
    settings below.

    Args:
        base_rate: Expected rows kept in a bucket of one sequence.
        min_bucket_size: Smallest number of positions in a bucket.
    """

    def __init__(self, base_rate: float, min_bucket_size: int) -> None:
        self.base_rate = base_rate
        self.min_bucket_size = min_bucket_size

    @abstractmethod
    def segments(self, length: int) -> list[Segment]:
        """Segments that cover positions 0 to ``length`` - 1 in ascending order.

        A segment's ``start`` names its random stream, so it must not depend on ``length``.
        """

    @abstractmethod
    def buckets(self, positions: Tensor) -> Tensor:
        """Bucket of each position; int64 tensors of one shape, in integer arithmetic."""


class UniformSampler(Sampler):
    """Buckets of equal size: position // min_bucket_size, kept with base_rate / min_bucket_size."""

    def segments(self, length: int) -> list[Segment]:
        """One segment, since every position has the same probability."""
        return [Segment(0, length, min(1.0, self.base_rate / self.min_bucket_size))]

    def buckets(self, positions: Tensor) -> Tensor:
        """Index of the chunk of ``min_bucket_size`` positions."""
        return positions // self.min_bucket_size


class AllSampler(UniformSampler):
    """Every position, with the buckets of ``uniform``."""

    def segments(self, length: int) -> list[Segment]:
        """One segment that is kept whole."""
        return [Segment(0, length, 1.0)]


class LogUniformSampler(Sampler):
    """Buckets that double: max(i_min, floor(log2(position + 1))), kept with base_rate / 2^bucket.

    i_min is ceil(log2(min_bucket_size)).
    """

    def __init__(self, base_rate: float, min_bucket_size: int) -> None:
        super().__init__(base_rate, min_bucket_size)
        self.min_exponent = (min_bucket_size - 1).bit_length()
        self._borders = 2 ** torch.arange(1, 32)

    def segments(self, length: int) -> list[Segment]:
        """One segment for each bucket."""
        starts = [0, *(2**i - 1 for i in range(self.min_exponent + 1, 32) if 2**i - 1 < length)]
        return [
            Segment(start, min(stop, length), min(1.0, self.base_rate / 2 ** (self.min_exponent + i)))
            for i, (start, stop) in enumerate(zip(starts, [*starts[1:], length], strict=True))
        ]

    def buckets(self, positions: Tensor) -> Tensor:
        """Exponent of the largest power of two that is at most position + 1."""
        exponents = torch.bucketize(positions + 1, self._borders, right=True)
        return exponents.clamp(min=self.min_exponent)


SAMPLERS: dict[str, type[Sampler]] = {
    "log_uniform": LogUniformSampler,
    "uniform": UniformSampler,
    "all": AllSampler,
}


def build_sampler(sampler_type: str, base_rate: float, min_bucket_size: int) -> Sampler:
    """The sampler of a name in ``SAMPLERS`` or of the class path of a ``Sampler`` subclass.

    Raises:
        UserError: There is no such sampler.
    """
    sampler_class = SAMPLERS.get(sampler_type) or _import_sampler(sampler_type)
    return sampler_class(base_rate=base_rate, min_bucket_size=min_bucket_size)


def _import_sampler(class_path: str) -> type[Sampler]:
    field = "sniffer.capture.sampler.type"
    module_name, _, class_name = class_path.rpartition(".")
    if not module_name:
        choices = (
            f"choose {', '.join(SAMPLERS)} or the class path of a qk_sniffer.capture.Sampler subclass"
        )
        remedy = did_you_mean(class_path, SAMPLERS, choices)
        raise UserError(f"{field}: no sampler is called {class_path!r}; {remedy}")
    try:
        sampler_class = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise UserError(
            f"{field}: {class_path} can't be imported ({error}); put its module on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UserError(f"{field}: {module_name} has no {class_name}; name a class of it") from error
    if not (isinstance(sampler_class, type) and issubclass(sampler_class, Sampler)):
        raise UserError(f"{field}: {class_path} is not a subclass of qk_sniffer.capture.Sampler")
    return sampler_class


def draw_positions(
    sampler: Sampler,
    seed: int,
    stream_ids: Tensor,
    example_ids: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw the kept positions of many sequences at once.

    Args:
        sampler: Gives the segments and their probabilities.
        seed: 64-bit seed of the random stream.
        stream_ids: (S,) int64 in [0, 2^32), one for each (layer, kind).
        example_ids: (S,) int64, the int32 ids of the sequences.
        lengths: (S,) int64, tokens in each sequence.

    Returns:
        Two int64 tensors (K,): the index into S and the position of each kept row, sorted by both.
    """
    longest = longest_of(lengths)
    if longest > MAX_POSITIONS:
        raise UserError(f"data: a sequence of {longest} tokens exceeds 2^31; set max_length")
    found: dict[int, list[Rows]] = {}
    drawing: list[_Drawing] = []
    for segment in sampler.segments(longest):
        sizes = (lengths.numpy() - segment.start).clip(0, segment.stop - segment.start)
        if segment.probability >= 1:
            found[segment.start] = [_every_row(segment.start, sizes)]
        elif sizes.any():
            found[segment.start] = []
            drawing.append(_Drawing.of(segment, sizes, found[segment.start]))
    while drawing:
        drawing = _draw_on(drawing, seed, stream_ids.numpy(), example_ids.numpy() & WORD)
    # What few sequences draw once more comes behind the others.
    in_order = [rows[0] if len(rows) == 1 else np.sort(np.concatenate(rows)) for rows in found.values()]
    rows = _merged(in_order, lengths.numel())
    return torch.from_numpy(rows >> 32), torch.from_numpy(rows & WORD)


def longest_of(lengths: Tensor) -> int:
    """The largest of some lengths; 0 where there are none."""
    return int(lengths.max()) if lengths.numel() else 0


def count_draws(sampler: Sampler, n_streams: int, lengths: Tensor) -> int:
    """How many layers and kinds draw rows of their own; those that keep every position share theirs.

    Args:
        sampler: Gives the segments and their probabilities.
        n_streams: Layers and kinds.
        lengths: (S,) int64, tokens in each sequence.
    """
    segments = sampler.segments(longest_of(lengths))
    keeps_all = all(segment.probability >= 1 for segment in segments)
    return min(1, n_streams) if keeps_all else n_streams


def keep_probabilities(sampler: Sampler, length: int) -> Tensor:
    """How likely each position is to be kept: (length,) float64.

    Args:
        sampler: Gives the segments and their probabilities.
        length: Number of positions.
    """
    kept = torch.zeros(length, dtype=torch.float64)
    for segment in sampler.segments(length):
        kept[segment.start : segment.stop] = min(1.0, segment.probability)
    return kept


def expected_rows_by_bucket(sampler: Sampler, lengths: Tensor) -> dict[int, float]:
    """Rows that one layer and kind keeps of some sequences in each bucket, on average.

    Args:
        sampler: Gives buckets, segments and their probabilities.
        lengths: (S,) int64, tokens in each sequence.
    """
    longest = longest_of(lengths)
    # Sequences that have a token at each position.
    reaching = lengths.numel() - torch.bincount(lengths, minlength=longest).cumsum(0)[:longest]
    rows = keep_probabilities(sampler, longest) * reaching
    buckets, places = torch.unique(sampler.buckets(torch.arange(longest)), return_inverse=True)
    sums = torch.zeros(buckets.numel(), dtype=torch.float64).index_add(0, places, rows)
    return dict(zip(buckets.tolist(), sums.tolist(), strict=True))


def _merged(segments: Sequence[Rows], n_sequences: int) -> Rows:
    """The rows of all segments, which ascend, sorted; those of each segment are."""
    if len(segments) == 1:
        return segments[0]
    counts = [np.bincount(rows >> 32, minlength=n_sequences) for rows in segments]
    totals = sum(counts, np.zeros(n_sequences, np.int64))
    merged = np.empty(totals.sum(), np.int64)
    places = totals.cumsum() - totals
    for rows, count in zip(segments, counts, strict=True):
        # Where a sequence's rows of this segment go, less where they come from.
        moves = places - (count.cumsum() - count)
        merged[np.arange(rows.size) + np.repeat(moves, count)] = rows
        places += count
    return merged


def _every_row(start: int, sizes: npt.NDArray[np.int64]) -> Rows:
    """All positions from ``start`` on."""
    sequences = np.repeat(np.arange(sizes.size), sizes)
    firsts = np.repeat(sizes.cumsum() - sizes, sizes)
    return (sequences << 32) + (np.arange(sequences.size) - firsts + start)


@dataclass(frozen=True)
class _Drawing:
    """Where the draws of one segment stand.

    Attributes:
        segment: The segment.
        sizes: (A,) positions in it, of the sequences that are not drawn to its end yet.
        sequences: (A,) their numbers.
        last: (A,) the last position of each that is kept so far, from the segment's start; -1 for none.
        draws_done: Gaps that each has drawn.
        found: Takes the rows of each turn, sorted.
    """

    segment: Segment
    sizes: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    draws_done: int
    found: list[Rows]

    @classmethod
    def of(cls, segment: Segment, sizes: npt.NDArray[np.int64], found: list[Rows]) -> "_Drawing":
        """Before the first draw."""
        sequences = sizes.nonzero()[0]
        return cls(segment, sizes[sequences], sequences, np.full_like(sequences, -1), 0, found)

    def draws_needed(self, limit: int) -> int:
        """Draws that take most sequences past their end, at most ``limit`` for all of them together."""
        expected = self.segment.probability * float((self.sizes - 1 - self.last).mean())
        draws = int(expected + 4 * expected**0.5) + 4
        return max(1, min(draws, limit // self.sizes.size))

    def keep(self, words: Words) -> "_Drawing | None":
        """Add the rows of some more draws to those that were found.

        Args:
            words: (4, A, draws).

        Returns:
            The sequences that have not come to their end; None where all have.
        """
        gaps = _geometric_gaps(self.segment.probability, words)
        offsets = self.last[:, None] + (gaps + 1).cumsum(axis=1)
        inside = offsets < self.sizes[:, None]
        self.found.append(((self.sequences[:, None] << 32) + (offsets + self.segment.start))[inside])
        left = inside[:, -1]
        if not left.any():
            return None
        return _Drawing(
            self.segment,
            self.sizes[left],
            self.sequences[left],
            offsets[left, -1],
            self.draws_done + words.shape[2],
            self.found,
        )


def _draw_on(
    drawing: Sequence[_Drawing],
    seed: int,
    stream_ids: npt.NDArray[np.int64],
    example_ids: npt.NDArray[np.int64],
) -> list[_Drawing]:
    """Draw further in all segments, by one call of the generator."""
    limit = _DRAWS_AT_ONCE // len(drawing)
    shapes = [(each.sizes.size, each.draws_needed(limit)) for each in drawing]
    borders = [0, *accumulate(map(math.prod, shapes))]
    words = np.empty((4, borders[-1]), np.uint64)
    parts = [
        words[:, start:stop].reshape(4, *shape)
        for shape, start, stop in zip(shapes, borders[:-1], borders[1:], strict=True)
    ]
    for each, part in zip(drawing, parts, strict=True):
        part[0] = np.arange(each.draws_done, each.draws_done + part.shape[2])
        part[1] = each.segment.start
        part[2] = stream_ids[each.sequences, None]
        part[3] = example_ids[each.sequences, None]
    mix(words, seed)
    left = [each.keep(part) for each, part in zip(drawing, parts, strict=True)]
    return [each for each in left if each is not None]


def _geometric_gaps(probability: float, words: Words) -> npt.NDArray[np.int64]:
    """Positions skipped before the next kept one: P(gap = g) = probability * (1 - probability)^g.

    The base-256 digits of a geometric variable are independent, so four words give its four digits.
    """
    gaps = np.zeros(words.shape[1:], np.int64)
    for power, digits in enumerate(_digits(probability)):
        if digits is not None:
            gaps += digits.of(words[power]) << (8 * power)
    return gaps


class _Digits:
    """Looks up the digit that a 32-bit word gives.

    Args:
        thresholds: (255,) ascending in [0, 2^32]; the digit is how many of them a word reaches.
    """

    def __init__(self, thresholds: npt.NDArray[np.int64]) -> None:
        self._thresholds = thresholds
        cells = np.arange(2**_CELL_BITS + 1) << _CELL_SHIFT
        reached = np.searchsorted(thresholds, cells, side="right")
        last = np.searchsorted(thresholds, cells[1:] - 1, side="right")
        # Words that share their leading bits mostly share their digit.
        self._table = np.where(reached[:-1] == last, last, -1)

    def of(self, words: Words) -> npt.NDArray[np.int64]:
        """The digits, in the shape of the words."""
        digits: npt.NDArray[np.int64] = self._table[words >> np.uint64(_CELL_SHIFT)]
        unsure = digits < 0
        digits[unsure] = np.searchsorted(self._thresholds, words[unsure].astype(np.int64), side="right")
        return digits


@lru_cache(maxsize=256)
def _digits(probability: float) -> tuple[_Digits | None, ...]:
    """The four digits of a gap; None for one that is always 0."""
    return tuple(
        None if thresholds[0] > WORD else _Digits(thresholds)
        for thresholds in _digit_thresholds(probability)
    )


def _digit_thresholds(probability: float) -> list[npt.NDArray[np.int64]]:
    """For each digit, round(2^32 P(digit <= j)) for j = 0 .. 254.

    Digit k is j with probability proportional to ratio^j, ratio = (1 - probability)^(256^k). The last
    digit is left untruncated: from 128 on it means a gap of 2^31 or more, past any sequence's end.
    Decimal arithmetic is done in software and so gives the same integers everywhere.
    """
    with localcontext() as context:
        context.prec = 60
        keep = Decimal(probability)
        thresholds = []
        for power in range(4):
            ratio = (1 - keep) ** (256**power)
            whole = 1 - ratio**256 if power < 3 else Decimal(1)
            cumulative = [(1 - ratio ** (j + 1)) / whole for j in range(255)]
            thresholds.append(np.array([round(2**32 * p) for p in cumulative]))
        return thresholds

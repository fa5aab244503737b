"""Samplers: which positions of a sequence are kept, and the random stream that decides.

A sampler cuts the positions into segments of one keep probability. Inside a segment the gaps between
kept positions are geometric, so the cost of a draw grows with the rows kept and not with the length
of the sequence. Every gap comes from one Philox call on (draw, segment, layer and kind, example), in
integers throughout: the same rows on every machine, for every batch size, order and device count.
A longer sequence keeps the same positions as its prefix.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture.random import WORD, Words, mix
from qk_sniffer.errors import UserError, did_you_mean

Rows = npt.NDArray[np.int64]
"""Kept rows, each (sequence << 32) + position."""

MAX_POSITIONS = 2**31
_DRAWS_AT_ONCE = 2**20
_CELL_BITS = 14
_CELL_SHIFT = 32 - _CELL_BITS
_NO_ROWS: Rows = np.empty(0, np.int64)


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


class PositionsSampler(UniformSampler):
    """Draws nothing: what is kept is listed. The buckets are those of ``uniform``."""

    def segments(self, length: int) -> list[Segment]:
        """None."""
        return []


class NoneSampler(LogUniformSampler):
    """Keeps no rows, for moments alone, whose buckets are those of ``log_uniform``."""

    def segments(self, length: int) -> list[Segment]:
        """None."""
        return []


SAMPLERS: dict[str, type[Sampler]] = {
    "log_uniform": LogUniformSampler,
    "uniform": UniformSampler,
    "all": AllSampler,
    "positions": PositionsSampler,
    "none": NoneSampler,
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
    found, drawn, sizes = [_NO_ROWS], [], []
    for segment in sampler.segments(longest):
        reached = np.minimum(lengths.numpy(), segment.stop) - segment.start
        if segment.probability >= 1:
            found.append(every_row(segment.start, reached.clip(0)))
        else:
            drawn.append(segment)
            sizes.append(reached)
    drawing = _Drawing.of(drawn, np.stack(sizes)) if drawn else None
    while drawing is not None:
        rows, drawing = drawing.draw(seed, stream_ids.numpy(), example_ids.numpy() & WORD)
        found.append(rows)
    # A stable sort merges what is in order already.
    joined = np.sort(np.concatenate(found), kind="stable")
    return torch.from_numpy(joined >> 32), torch.from_numpy(joined & WORD)


def longest_of(lengths: Tensor) -> int:
    """The largest of some lengths; 0 where there are none."""
    return int(lengths.max()) if lengths.numel() else 0


def every_row(start: int, sizes: npt.NDArray[np.int64]) -> Rows:
    """All positions of each sequence from ``start`` on, (S,) of them."""
    sequences = np.repeat(np.arange(sizes.size), sizes)
    firsts = np.repeat(sizes.cumsum() - sizes, sizes)
    return (sequences << 32) + (np.arange(sequences.size) - firsts + start)


@dataclass(frozen=True)
class _Drawing:
    """Where the draws of all segments stand.

    Attributes:
        segments: The segments.
        numbers: (A,) the segments, by their numbers and ascending, whose end some sequence has not come
            to yet.
        sequences: (A,) the number of that sequence.
        sizes: (A,) its positions in the segment.
        last: (A,) the last position that is kept so far, from the segment's start; -1 for none.
        draws_done: Gaps that each has drawn.
    """

    segments: Sequence[Segment]
    numbers: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    draws_done: int

    @classmethod
    def of(cls, segments: Sequence[Segment], sizes: npt.NDArray[np.int64]) -> "_Drawing | None":
        """Before the first draw; None where there is nothing to draw.

        Args:
            segments: The segments.
            sizes: (segments, S) positions of each sequence in each; those below 1 are none.
        """
        numbers, sequences = (sizes > 0).nonzero()
        if not numbers.size:
            return None
        return cls(
            segments, numbers, sequences, sizes[numbers, sequences], np.full_like(numbers, -1), 0
        )

    def draw(
        self, seed: int, stream_ids: npt.NDArray[np.int64], example_ids: npt.NDArray[np.int64]
    ) -> "tuple[Rows, _Drawing | None]":
        """Draw further in all segments, by one call of the generator.

        Returns:
            The rows that were found, and what has not come to its end; None where all has.
        """
        starts = np.array([segment.start for segment in self.segments])[self.numbers]
        words = np.empty((4, self.sizes.size, self._draws_needed()), np.uint64)
        words[0] = np.arange(self.draws_done, self.draws_done + words.shape[2])
        words[1] = starts[:, None]
        words[2] = stream_ids[self.sequences, None]
        words[3] = example_ids[self.sequences, None]
        mix(words.reshape(4, -1), seed)
        steps = self._steps(words)
        offsets = np.cumsum(steps, axis=1, out=steps)
        offsets += self.last[:, None]
        inside = offsets < self.sizes[:, None]
        left, rest = inside[:, -1], None
        if left.any():
            rest = _Drawing(
                self.segments,
                self.numbers[left],
                self.sequences[left],
                self.sizes[left],
                offsets[left, -1],
                self.draws_done + words.shape[2],
            )
        offsets += ((self.sequences << 32) + starts)[:, None]
        return offsets[inside], rest

    def _draws_needed(self) -> int:
        """Draws that take most sequences past their end, within what is drawn at once."""
        probabilities = np.array([segment.probability for segment in self.segments])
        rows = probabilities[self.numbers] * (self.sizes - 1 - self.last)
        expected = float(rows.sum()) / rows.size
        most: int = _DRAWS_AT_ONCE // rows.size
        return max(1, min(int(expected + 4 * expected**0.5) + 4, most))

    def _steps(self, words: Words) -> npt.NDArray[np.int64]:
        """From each kept position to the next: (A, draws), from their words (4, A, draws)."""
        steps = np.ones(words.shape[1:], np.int64)
        stops = np.bincount(self.numbers, minlength=len(self.segments)).cumsum().tolist()
        for segment, start, stop in zip(self.segments, [0, *stops], stops, strict=False):
            if start < stop:
                _add_gaps(steps[start:stop], segment.probability, words[:, start:stop])
        return steps


def _add_gaps(steps: npt.NDArray[np.int64], probability: float, words: Words) -> None:
    """Add the positions skipped before each kept one: P(gap = g) = probability (1 - probability)^g.

    The base-256 digits of a geometric variable are independent, so four words give its four digits.
    """
    for power, digits in enumerate(_digits(probability)):
        # Those behind the first are 0 in nearly every gap.
        if digits is not None and words[power].max() >= digits.least:
            steps += digits.of(words[power]) << (8 * power)


class _Digits:
    """Looks up the digit that a 32-bit word gives.

    Args:
        thresholds: (255,) ascending in [0, 2^32]; the digit is how many of them a word reaches.
    """

    def __init__(self, thresholds: npt.NDArray[np.int64]) -> None:
        self._thresholds = thresholds
        self.least = thresholds[0]
        """The smallest word whose digit is not 0."""
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

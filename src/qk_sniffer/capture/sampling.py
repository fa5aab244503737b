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
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qk_sniffer.capture.random import WORD, philox4x32
from qk_sniffer.errors import UserError
from qk_sniffer.misspelt import did_you_mean

MAX_POSITIONS = 2**31
_DRAWS_AT_ONCE = 2**20


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
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest > MAX_POSITIONS:
        raise UserError(f"data: a sequence of {longest} tokens exceeds 2^31; set max_length")
    drawn: list[Tensor] = []
    for segment in sampler.segments(longest):
        sizes = (lengths - segment.start).clamp(0, segment.stop - segment.start)
        if segment.probability >= 1:
            offsets = _every_offset(sizes)
        else:
            words = (segment.start, stream_ids, example_ids & WORD)
            offsets = _geometric_offsets(segment.probability, seed, words, sizes)
        drawn += [offset + segment.start for offset in offsets]
    # A row is one int64: the sequence above, the position below bit 32.
    rows = torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64)
    if len(drawn) > 1:
        rows = rows.sort().values
    return rows >> 32, rows & WORD


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
    longest = int(lengths.max()) if lengths.numel() else 0
    # Sequences that have a token at each position.
    reaching = lengths.numel() - torch.bincount(lengths, minlength=longest).cumsum(0)[:longest]
    rows = keep_probabilities(sampler, longest) * reaching
    buckets, places = torch.unique(sampler.buckets(torch.arange(longest)), return_inverse=True)
    sums = torch.zeros(buckets.numel(), dtype=torch.float64).index_add(0, places, rows)
    return dict(zip(buckets.tolist(), sums.tolist(), strict=True))


def _every_offset(sizes: Tensor) -> list[Tensor]:
    sequences = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)
    firsts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return [(sequences << 32) + torch.arange(sequences.numel()) - firsts]


def _geometric_offsets(
    probability: float, seed: int, words: tuple[int, Tensor, Tensor], sizes: Tensor
) -> list[Tensor]:
    """Kept offsets of each sequence inside one segment, as rows (sequence << 32) + offset."""
    segment_start, stream_ids, example_ids = words
    active = torch.nonzero(sizes > 0).squeeze(1)
    last = torch.full_like(active, -1)
    draws_done = 0
    found: list[Tensor] = []
    while active.numel():
        draws = _draws_needed(probability, sizes[active] - 1 - last)
        numbers = torch.arange(draws_done, draws_done + draws)
        gaps = _geometric_gaps(
            probability,
            philox4x32(
                (numbers, segment_start, stream_ids[active, None], example_ids[active, None]), seed
            ),
        )
        offsets = last[:, None] + (gaps + 1).cumsum(dim=1)
        inside = offsets < sizes[active, None]
        found.append(((active[:, None] << 32) + offsets)[inside])
        unfinished = inside[:, -1]
        active, last = active[unfinished], offsets[unfinished, -1]
        draws_done += draws
    return found


def _draws_needed(probability: float, remaining: Tensor) -> int:
    """Draws that take most sequences past their end, within the memory of one step."""
    expected = probability * remaining.to(torch.float64).mean().item()
    draws = int(expected + 4 * expected**0.5) + 4
    return max(1, min(draws, _DRAWS_AT_ONCE // remaining.numel()))


def _geometric_gaps(probability: float, words: Sequence[Tensor]) -> Tensor:
    """Positions skipped before the next kept one: P(gap = g) = probability * (1 - probability)^g.

    The base-256 digits of a geometric variable are independent, so four words give its four digits.
    """
    gaps = torch.zeros_like(words[0])
    for power, (thresholds, word) in enumerate(zip(_digit_thresholds(probability), words, strict=True)):
        digit = torch.bucketize(word, thresholds, right=True)
        gaps += digit << (8 * power)
    return gaps


@lru_cache(maxsize=256)
def _digit_thresholds(probability: float) -> tuple[Tensor, ...]:
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
            thresholds.append(torch.tensor([round(2**32 * p) for p in cumulative]))
        return tuple(thresholds)

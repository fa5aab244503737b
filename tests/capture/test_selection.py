"""What is kept beside what a sampler draws, shared draws, and how likely each position is kept."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import norm
from test_sampling import ERROR_RATE
from torch import Tensor

from qk_sniffer.capture import Listed, Sampler, Segment, Selection, build_sampler
from qk_sniffer.capture.plan import Plans

LENGTHS = [1000, 3, 0, 513, 5000, 64, 1]
STREAMS = ((0, "q"), (0, "k"), (3, "q"), (3, "k"))


def draw(
    selection: Selection, lengths: list[int], listed: Listed | None = None, stream: int = 0
) -> list[list[int]]:
    """Kept positions of each of several texts with the ids 0, 1, …"""
    count = len(lengths)
    sequences, positions = selection.draw(
        torch.full((count,), stream), torch.arange(count), torch.tensor(lengths), listed
    )
    kept: list[list[int]] = [[] for _ in lengths]
    for sequence, position in zip(sequences.tolist(), positions.tolist(), strict=True):
        kept[sequence].append(position)
    return kept


class Halves(Sampler):
    """A sampler of someone's own: the even positions, and each odd one with a probability of a half."""

    def segments(self, length: int) -> list[Segment]:
        return [Segment(p, p + 1, 1 / (1 + p % 2)) for p in range(length)]

    def buckets(self, positions: Tensor) -> Tensor:
        return positions % 2


SAMPLERS = {
    "uniform": build_sampler("uniform", 5.0, 64),
    "log_uniform": build_sampler("log_uniform", 5.0, 16),
    "all": build_sampler("all", 1.0, 64),
    "positions": build_sampler("positions", 1.0, 64),
    "own": Halves(1.0, 1),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("keep_first", [1, 4, 600, 10_000])
def test_the_first_positions_are_kept_besides_those_that_are_drawn(name: str, keep_first: int) -> None:
    sampler = SAMPLERS[name]
    for length, usual, kept in zip(
        LENGTHS,
        draw(Selection(sampler, 7), LENGTHS),
        draw(Selection(sampler, 7, keep_first), LENGTHS),
        strict=True,
    ):
        assert kept == sorted({*range(min(length, keep_first)), *usual})


@pytest.mark.parametrize("keep_first", [0, 6])
def test_listed_positions_are_kept_as_far_as_a_text_has_them(keep_first: int) -> None:
    selection = Selection(SAMPLERS["positions"], keep_first=keep_first)
    lists = [[], [0, 2, 3], [5], [512, 513, 2**31 - 1], [4999], [3, 63], [0]]
    lists_of_all = [0, 5, 63, 2**31 - 1]
    listed = Listed.of([np.array(some, np.int64) for some in lists])
    expected = [
        sorted({p for p in (*some, *range(keep_first)) if p < length})
        for some, length in zip(lists, LENGTHS, strict=True)
    ]
    assert draw(selection, LENGTHS, listed) == expected
    assert draw(selection, LENGTHS[3:], listed.part(3, 7)) == expected[3:]
    assert selection.expected_rows(torch.tensor(LENGTHS), listed).tolist() == list(map(len, expected))
    of_all = Selection(SAMPLERS["positions"], 0, keep_first, np.array(lists_of_all))
    assert draw(of_all, LENGTHS) == [
        sorted({p for p in (*lists_of_all, *range(keep_first)) if p < length}) for length in LENGTHS
    ]
    assert selection.needs_lists and not of_all.needs_lists


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("keep_first", [0, 70])
def test_expected_rows_are_sums_of_the_probabilities(name: str, keep_first: int) -> None:
    lists = [np.arange(0, length + 9, 7) for length in LENGTHS]
    selection = Selection(SAMPLERS[name], 0, keep_first)
    listed = Listed.of(lists) if selection.needs_lists else None
    p = selection.keep_probabilities(np.arange(max(LENGTHS)))
    rows, by_bucket = [], dict[int, float]()
    for length, some in zip(LENGTHS, lists, strict=True):
        own = p[:length].copy()
        if listed is not None:
            own[some[some < length]] = 1
        rows.append(own.sum())
        buckets = selection.sampler.buckets(torch.arange(length)).tolist()
        for bucket, probability in zip(buckets, own, strict=True):
            by_bucket[bucket] = by_bucket.get(bucket, 0) + probability
    lengths = torch.tensor(LENGTHS)
    assert selection.expected_rows(lengths, listed) == pytest.approx(rows)
    assert selection.expected_rows_by_bucket(lengths, listed) == pytest.approx(by_bucket)


def test_keep_probabilities_are_those_of_the_formulas() -> None:
    positions = np.array([0, 1, 3, 4, 15, 16, 127, 128, 2**24 - 2, 2**24 - 1, 2**31 - 2])
    log_uniform = Selection(build_sampler("log_uniform", 3.0, 8), keep_first=4)
    expected = [
        Fraction(1) if p < 4 else min(Fraction(1), Fraction(3, 2 ** max(3, (p + 1).bit_length() - 1)))
        for p in positions.tolist()
    ]
    assert log_uniform.keep_probabilities(positions).tolist() == [float(p) for p in expected]
    uniform = Selection(build_sampler("uniform", 3.0, 8), positions=np.array([4, 128, 2**31 - 1]))
    expected = [Fraction(1) if p in (4, 128) else Fraction(3, 8) for p in positions.tolist()]
    assert uniform.keep_probabilities(positions).tolist() == [float(p) for p in expected]
    every = Selection(build_sampler("uniform", math.inf, 8))
    assert every.keep_probabilities(positions[:0]).shape == (0,)
    assert (every.keep_probabilities(positions) == 1).all()
    own = Selection(Halves(1.0, 1)).keep_probabilities(np.array([3, 0, 1]))
    assert own.tolist() == [0.5, 1, 0.5]


@pytest.mark.parametrize("name", ["uniform", "log_uniform", "own"])
def test_weighted_sums_are_unbiased(name: str) -> None:
    """Each of the six fails by chance with a probability of ``ERROR_RATE`` / 6."""
    selection, n_texts, length = Selection(SAMPLERS[name], 11, keep_first=20), 300, 3000
    rows = np.concatenate(draw(selection, [length] * n_texts))
    p, all_p = selection.keep_probabilities(rows), selection.keep_probabilities(np.arange(length))
    for value in (np.ones(length), 1 / (1 + np.arange(length)) - 0.1):
        found = (value[rows] / p).sum()
        expected = n_texts * value.sum()
        deviation = math.sqrt(n_texts * (value**2 * (1 - all_p) / all_p).sum())
        assert 2 * norm.sf(abs(found - expected) / deviation) > ERROR_RATE / 6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("lowest", [0, 3])
def test_shared_draws_are_one_of_the_first_random_stream(name: str, lowest: int) -> None:
    """Whichever layers and kinds are captured."""
    selection = Selection(SAMPLERS[name], 7, keep_first=2, shared=True)
    streams = STREAMS[lowest:]
    assert selection.count_draws(streams, torch.tensor(LENGTHS)) == 1
    plan = Plans(streams, selection, ()).next(range(len(LENGTHS)), LENGTHS)
    assert plan.draws == dict.fromkeys(streams, 0)
    kept: list[list[int]] = [[] for _ in LENGTHS]
    for sequence, position in zip(plan.batch_indices.tolist(), plan.positions.tolist(), strict=True):
        kept[sequence].append(position)
    assert kept == draw(Selection(SAMPLERS[name], 7, keep_first=2), LENGTHS, stream=0)


def test_without_chance_in_it_one_draw_serves_all() -> None:
    lengths = torch.tensor(LENGTHS)
    counts = {
        name: Selection(sampler, keep_first=3).count_draws(STREAMS, lengths)
        for name, sampler in SAMPLERS.items()
    }
    assert counts == {"uniform": 4, "log_uniform": 4, "all": 1, "positions": 1, "own": 4}


def test_plans_have_the_positions_that_come_with_their_batch() -> None:
    """Also between batches that were expected, and with ids and lengths of one of these."""
    selection = Selection(SAMPLERS["positions"])
    plans = Plans(STREAMS, selection, [([1], [9]), ([2], [9])])
    for ids, some in ([1], [4, 8]), ([1], [0]), ([2], []), ([3], [7, 9]):
        plan = plans.next(ids, [9], Listed.of([np.array(some, np.int64)]))
        assert plan.positions.tolist() == [p for p in some if p < 9]
        assert plan.buckets.tolist() == [0] * len(plan.positions)


def test_the_draws_of_a_plain_selection_stay_what_they_are() -> None:
    """Those of the first version, whose data roots go on."""
    uniform = Selection(build_sampler("uniform", 2.0, 16), 3)
    assert draw(uniform, [80], stream=5) == [[4, 8, 27, 39, 46, 52, 58, 62, 76]]
    log_uniform = Selection(build_sampler("log_uniform", 2.0, 4), 3)
    assert draw(log_uniform, [128], stream=5) == [[0, 1, 5, 13, 15, 26, 52, 62, 80, 99, 106, 107]]

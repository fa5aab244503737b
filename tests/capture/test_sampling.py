"""Sampling: exact buckets, the formula's probabilities, and independence of everything but the key."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import binomtest, chisquare, kstest
from torch import Tensor

from qk_sniffer.capture import Sampler, Segment, build_sampler, draw_positions
from qk_sniffer.capture.random import philox4x32
from qk_sniffer.errors import UserError

# Every statistical test below fails by chance with this probability at most, over all its cases.
ERROR_RATE = 1e-6


def draw(
    sampler: Sampler, lengths: list[int], *, seed: int = 0, stream: int = 0, first_id: int = 0
) -> list[list[int]]:
    """Kept positions of each of several sequences with the ids first_id, first_id + 1, …"""
    count = len(lengths)
    sequences, positions = draw_positions(
        sampler,
        seed,
        torch.full((count,), stream),
        torch.arange(first_id, first_id + count),
        torch.tensor(lengths),
    )
    kept: list[list[int]] = [[] for _ in lengths]
    for sequence, position in zip(sequences.tolist(), positions.tolist(), strict=True):
        kept[sequence].append(position)
    return kept


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: int, expected: str
) -> None:
    assert " ".join(f"{int(word):08x}" for word in philox4x32(counter, key)) == expected


@pytest.mark.parametrize("min_bucket_size", [1, 2, 3, 128, 8192, 8193, 2**31])
def test_log_uniform_buckets_are_exact_at_every_power_of_two(min_bucket_size: int) -> None:
    sampler = build_sampler("log_uniform", 1.0, min_bucket_size)
    positions = sorted(
        {2**i + offset for i in range(32) for offset in (-2, -1, 0) if 0 <= 2**i + offset < 2**31}
    )
    i_min = next(i for i in range(33) if 2**i >= min_bucket_size)
    expected = [max(i_min, (position + 1).bit_length() - 1) for position in positions]
    assert sampler.buckets(torch.tensor(positions)).tolist() == expected


@pytest.mark.parametrize("min_bucket_size", [1, 3, 128, 8192])
def test_none_keeps_nothing_and_has_the_buckets_of_log_uniform(min_bucket_size: int) -> None:
    sampler = build_sampler("none", 1e30, min_bucket_size)
    _, positions = draw_positions(sampler, 0, *(torch.tensor([number]) for number in (0, 7, 100_000)))
    assert positions.numel() == 0
    every = torch.arange(100_000)
    expected = build_sampler("log_uniform", 1.0, min_bucket_size).buckets(every)
    assert sampler.buckets(every).equal(expected)


@pytest.mark.parametrize("sampler_type", ["uniform", "all"])
@pytest.mark.parametrize("min_bucket_size", [1, 3, 128, 8192])
def test_uniform_buckets_are_chunks(sampler_type: str, min_bucket_size: int) -> None:
    sampler = build_sampler(sampler_type, 1.0, min_bucket_size)
    positions = [0, 1, 2, 127, 128, 8191, 8192, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1]
    expected = [position // min_bucket_size for position in positions]
    assert sampler.buckets(torch.tensor(positions)).tolist() == expected


@pytest.mark.parametrize("length", [1, 2, 254, 255, 256, 257, 70_000, 2**24 + 1, 2**31])
@pytest.mark.parametrize("min_bucket_size", [1, 100, 128, 8192])
def test_log_uniform_segments_have_the_probability_of_their_bucket(
    length: int, min_bucket_size: int
) -> None:
    sampler = build_sampler("log_uniform", 3.0, min_bucket_size)
    segments = sampler.segments(length)
    assert segments[0].start == 0
    assert segments[-1].stop == length
    for segment, following in itertools.pairwise(segments):
        assert segment.stop == following.start
    for segment in segments:
        ends = torch.tensor([segment.start, segment.stop - 1])
        first, last = sampler.buckets(ends).tolist()
        assert first == last
        assert segment.probability == float(min(Fraction(1), Fraction(3, 2**first)))


@pytest.mark.parametrize(
    ("sampler_type", "base_rate", "min_bucket_size", "length"),
    [
        ("uniform", 1.0, 2, 4_000),
        ("uniform", 1.0, 128, 40_000),
        ("uniform", 100.0, 128, 4_000),
        ("uniform", 1.0, 8192, 1_000_000),
        ("log_uniform", 1.0, 2, 30_000),
        ("log_uniform", 64.0, 128, 100_000),
        ("log_uniform", 300.0, 200, 100_000),
    ],
)
def test_kept_fractions_match_the_formula(
    sampler_type: str, base_rate: float, min_bucket_size: int, length: int
) -> None:
    sampler = build_sampler(sampler_type, base_rate, min_bucket_size)
    sequences = 200
    kept = torch.tensor([p for row in draw(sampler, [length] * sequences) for p in row])
    buckets = sampler.buckets(torch.arange(length))
    # Uniform has thousands of small buckets of one probability; they are tested as ten groups.
    groups = buckets if sampler_type == "log_uniform" else buckets * 10 // (int(buckets.max()) + 1)
    sizes, counts = (
        torch.bincount(groups),
        torch.bincount(groups[kept], minlength=int(groups.max()) + 1),
    )
    tested = torch.nonzero(sizes).squeeze(1).tolist()
    for group in tested:
        if sampler_type == "log_uniform":
            probability = min(1.0, base_rate / 2**group)
        else:
            probability = min(1.0, base_rate / min_bucket_size)
        trials, successes = int(sizes[group]) * sequences, int(counts[group])
        assert binomtest(successes, trials, probability).pvalue > ERROR_RATE / 7 / len(tested)


def test_gaps_are_geometric() -> None:
    probability = 1 / 50
    rows = draw(build_sampler("uniform", 1.0, 50), [50_000] * 100)
    gaps = [b - a - 1 for row in rows for a, b in itertools.pairwise(row)]
    edges = [*range(0, 200, 5), 10**9]
    observed = [sum(low <= gap < high for gap in gaps) for low, high in itertools.pairwise(edges)]
    survival = [(1 - probability) ** edge for edge in edges]
    expected = [(a - b) * len(gaps) for a, b in itertools.pairwise(survival)]
    expected[-1] += len(gaps) - sum(expected)
    assert chisquare(observed, expected).pvalue > ERROR_RATE


def test_neighbouring_streams_are_independent() -> None:
    sampler = build_sampler("uniform", 1.0, 10)
    keys = [dict(seed=s, stream=t, first_id=i) for s in (0, 1) for t in (0, 1) for i in (0, 1)]
    kept = [set(draw(sampler, [200_000], **key)[0]) for key in keys]
    pairs = [(a, b) for i, a in enumerate(kept) for b in kept[i + 1 :]]
    for first, second in pairs:
        shared = binomtest(len(first & second), 200_000, 1 / 100)
        assert shared.pvalue > ERROR_RATE / len(pairs)


@pytest.mark.parametrize("probability", [1e-8, 1e-10])
def test_gaps_beyond_the_longest_sequence_are_not_folded_back(probability: float) -> None:
    sampler = build_sampler("uniform", probability, 1)
    length = 2**31
    kept = [p for row in draw(sampler, [length] * 2000) for p in row]
    assert binomtest(len(kept), length * 2000, probability).pvalue > ERROR_RATE / 4
    assert kstest([p / length for p in kept], "uniform").pvalue > ERROR_RATE / 4


@pytest.mark.parametrize("sampler_type", ["uniform", "log_uniform", "all"])
def test_rows_do_not_depend_on_the_company_of_a_sequence(sampler_type: str) -> None:
    sampler = build_sampler(sampler_type, 20.0, 64)
    lengths = [1000, 3, 0, 513, 5000, 64, 1]
    together = draw(sampler, lengths)
    alone = [draw(sampler, [length], first_id=i)[0] for i, length in enumerate(lengths)]
    assert together == alone
    longer = draw(sampler, [2 * length + 7 for length in lengths])
    assert together == [
        [p for p in row if p < length] for row, length in zip(longer, lengths, strict=True)
    ]


def test_every_part_of_the_key_changes_the_draw() -> None:
    sampler = build_sampler("uniform", 1.0, 16)
    base = draw(sampler, [5000])
    assert draw(sampler, [5000]) == base
    assert draw(sampler, [5000], seed=1) != base
    assert draw(sampler, [5000], seed=2**32) != base
    assert draw(sampler, [5000], stream=1) != base
    assert draw(sampler, [5000], first_id=-5) != base


class EveryTenth(Sampler):
    """A sampler of someone's own: every tenth position, in one bucket."""

    def segments(self, length: int) -> list[Segment]:
        return [Segment(start, min(start + 1, length), 1.0) for start in range(0, length, 10)]

    def buckets(self, positions: Tensor) -> Tensor:
        return torch.zeros_like(positions)


def test_a_sampler_is_named_by_its_class_path() -> None:
    sampler = build_sampler(f"{__name__}.EveryTenth", 1.0, 1)
    assert draw(sampler, [35, 10]) == [[0, 10, 20, 30], [0]]


@pytest.mark.parametrize(
    ("sampler_type", "message"),
    [
        ("gaussian", "no sampler is called 'gaussian'; choose log_uniform, uniform, all"),
        ("no.such.Sampler", "no.such.Sampler can't be imported"),
        ("math.pi", "math.pi is not a subclass of qk_sniffer.capture.Sampler"),
    ],
)
def test_an_unknown_sampler_is_named(sampler_type: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^sniffer\.capture\.sampler\.type: ") as error:
        build_sampler(sampler_type, 1.0, 1)
    assert message in str(error.value)


def test_probability_one_keeps_everything() -> None:
    assert draw(build_sampler("uniform", math.inf, 4), [5, 2]) == [[0, 1, 2, 3, 4], [0, 1]]

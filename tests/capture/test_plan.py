"""Batches that are drawn together, and others than were expected."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from qk_sniffer.capture import Sampler, Selection, build_sampler
from qk_sniffer.capture.plan import BATCHES_AT_ONCE, TOKENS_AT_ONCE, Batch, BatchPlan, Plans, Stream

STREAMS: tuple[Stream, ...] = ((0, "q"), (0, "k"), (3, "q"), (3, "k"))
SAMPLERS = {
    "uniform": build_sampler("uniform", 3.0, 16),
    "log_uniform": build_sampler("log_uniform", 4.0, 4),
    "all": build_sampler("all", 1.0, 16),
}


def batches(sizes: Sequence[int] = (3, 1, 5, 2, 1, 4) * 7) -> list[Batch]:
    """Of so many texts each, of 0 to 200 tokens; some are too short for a draw of ``log_uniform``."""
    generator = torch.Generator().manual_seed(0)
    ids = itertools.count(-20)
    made = []
    for number, size in enumerate(sizes):
        most = 3 if number % 4 == 1 else 200
        lengths = torch.randint(0, most, (size,), generator=generator).tolist()
        made.append(([next(ids) for _ in range(size)], lengths))
    return made


def rows(drawn: BatchPlan) -> dict[Stream, list[tuple[int, int, int]]]:
    """Sequence, position and bucket of the rows of each layer and kind."""
    stops = [0, *drawn.stops.tolist()]
    columns = (drawn.batch_indices, drawn.positions, drawn.buckets)
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(found) == stops[-1]
    return {s: found[stops[number] : stops[number + 1]] for s, number in drawn.draws.items()}


def alone(sampler: Sampler, batch: Batch) -> dict[Stream, list[tuple[int, int, int]]]:
    return rows(Plans(STREAMS, Selection(sampler, 7), ()).next(*batch))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("come", ["as expected", "in another order", "without some", "more"])
def test_every_batch_has_the_rows_that_it_has_alone(name: str, come: str) -> None:
    sampler, expected = SAMPLERS[name], batches()
    coming = {
        "as expected": expected,
        "in another order": expected[:5] + expected[:4:-1],
        "without some": expected[:3] + expected[9:],
        "more": [*expected, ([100, 101], [50, 60]), ([102], [0])],
    }[come]
    plans = Plans(STREAMS, Selection(sampler, 7), iter(expected))
    for batch in coming:
        drawn = plans.next(*batch)
        assert rows(drawn) == alone(sampler, batch)
        assert drawn.example_ids.tolist() == batch[0] and drawn.lengths.tolist() == batch[1]
        assert drawn.longest == max(batch[1])


@pytest.mark.parametrize(
    ("tokens", "n_draws"),
    [(128, -(-40 // BATCHES_AT_ONCE)), (TOKENS_AT_ONCE // 4, 10), (TOKENS_AT_ONCE, 40)],
)
def test_many_are_drawn_at_once_within_a_bound(
    tokens: int, n_draws: int, draws: list[torch.Tensor]
) -> None:
    expected = [([number], [tokens]) for number in range(40)]
    plans = Plans(STREAMS, Selection(SAMPLERS["log_uniform"]), expected)
    for batch in expected:
        plans.next(*batch)
    assert len(draws) == n_draws
    most = max(int(lengths.sum()) for lengths in draws)
    assert most <= len(STREAMS) * max(TOKENS_AT_ONCE, tokens)


def test_nothing_is_drawn_in_vain_once_others_have_come(draws: list[torch.Tensor]) -> None:
    plans = Plans(STREAMS, Selection(SAMPLERS["uniform"]), [([number], [50]) for number in range(40)])
    for number in range(100, 120):
        plans.next([number], [50])
    assert [len(lengths) // len(STREAMS) for lengths in draws] == [1] * 20

"""Moments of every token, against float64 over the very vectors that were added."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from qk_sniffer.capture import AttentionLayer, CapturedStream, MomentSums, build_sampler, tiles
from qk_sniffer.kinds import Kind
from qk_sniffer.moments import NO_BUCKET, MomentTable, joined

HEADS: dict[Kind, tuple[int, ...]] = {"q": (0, 2, 3), "k": (0, 1), "v": (0, 1), "o": (0, 2, 3)}
N_HEADS: dict[Kind, int] = {"q": 4, "k": 2, "v": 2, "o": 4}
WIDTHS: dict[Kind, int] = {"q": 12, "k": 12, "v": 8, "o": 8}
LENGTHS = [70, 41, 0, 70, 1]

Floats = npt.NDArray[np.float64]


def streams(*kinds: Kind) -> list[CapturedStream]:
    layer = AttentionLayer(0, 4, 2, 12, value_head_dim=8)
    return [CapturedStream(layer, kind, HEADS[kind]) for kind in kinds]


def batch(
    kinds: tuple[Kind, ...],
    *,
    n_sequences: int = 5,
    dtype: torch.dtype = torch.float32,
    mean: float = 0,
) -> dict[Kind, Tensor]:
    """Vectors of a batch, (B, n_heads, S, width), as a model lays them out; padding is infinite."""
    states = {}
    for kind in kinds:
        shape = n_sequences, max(LENGTHS) + 3, N_HEADS[kind], WIDTHS[kind]
        values = torch.randn(shape) * torch.linspace(0.1, 3, WIDTHS[kind]) + mean
        for number in range(n_sequences):
            values[number, LENGTHS[number] :] = torch.inf
        states[kind] = values.to(dtype).transpose(1, 2)
    return states


def tokens_of(batches: list[dict[Kind, Tensor]], kind: Kind, head: int, bucket: range) -> Floats:
    """(N, width): the vectors of a head at some positions of all texts."""
    texts = [
        states[kind][number, head, bucket.start : min(bucket.stop, length)].double().numpy()
        for states in batches
        for number, length in enumerate(LENGTHS[: len(states[kind])])
    ]
    return np.concatenate(texts)


def positions_of(batches: list[dict[Kind, Tensor]], bucket: range) -> list[int]:
    n_sequences = [len(next(iter(states.values()))) for states in batches]
    return [
        position
        for size in n_sequences
        for length in LENGTHS[:size]
        for position in range(bucket.start, min(bucket.stop, length))
    ]


def assert_moments(
    table: MomentTable,
    row: int,
    vectors: Floats,
    positions: list[int],
    keys: Floats | None = None,
    *,
    within: float,
) -> None:
    """A row of a table is the moments of some tokens."""
    assert table.count[row] == len(vectors)
    assert table.position_sum[row] == sum(positions)
    assert table.position_square_sum[row] == sum(p * p for p in positions)
    mean = vectors.mean(0)
    off = vectors - mean
    places = np.array(positions) - np.mean(positions)
    spread = np.sqrt((off**2).mean(0))
    assert np.all(np.abs(table.mean[row] - mean) <= within * spread + 1e-15 * np.abs(mean))
    floor = 1e-9 * len(vectors) * np.outer(spread, spread)
    scale = np.abs(off.T) @ np.abs(off) + floor
    assert np.all(np.abs(table.products[row] - off.T @ off) <= within * scale)
    with_positions = np.abs(off.T) @ np.abs(places) + 1e-9
    assert np.all(np.abs(table.position_products[row] - off.T @ places) <= within * with_positions)
    if keys is not None:
        assert table.key_mean is not None and table.key_products is not None
        keys_off = keys - keys.mean(0)
        assert np.allclose(table.key_mean[row], keys.mean(0), rtol=1e-6, atol=within)
        scale = np.abs(off.T) @ np.abs(keys_off) + 1e-9
        assert np.all(np.abs(table.key_products[row] - off.T @ keys_off) <= within * scale)


def add(sums: MomentSums, states: dict[Kind, Tensor], *, cuts: tuple[int, ...] = ()) -> None:
    """Add a whole batch, in passages that end at some positions."""
    some = next(iter(states.values()))
    n_sequences, length = some.shape[0], some.shape[2]
    starts = [0, *cuts]
    for start, stop in zip(starts, [*cuts, length], strict=True):
        part = {kind: values[:, :, start:stop] for kind, values in states.items()}
        for kinds in (("q", "k"), ("v", "o")):
            own = {kind: part[kind] for kind in kinds if kind in part}
            if own:
                sums.add(0, own, range(n_sequences), range(start, stop))


@pytest.mark.parametrize("cuts", [(), (1, 33, 69)], ids=["whole", "passages"])
@pytest.mark.parametrize("at_once", [32 * 2**20, 1000], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("kinds", [("q", "k", "v", "o"), ("k",), ("q", "o")], ids="".join)
def test_moments_are_those_of_the_tokens(
    kinds: tuple[Kind, ...], at_once: int, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "MOMENTS_BYTES", at_once)
    sums = MomentSums(streams(*kinds), cross=kinds[:2] == ("q", "k"))
    batches = [batch(kinds), batch(kinds, n_sequences=1), batch(kinds, n_sequences=2)]
    for states in batches:
        sums.begin_batch(LENGTHS[: len(states[kinds[0]])])
        add(sums, states, cuts=cuts)
        sums.end_batch()
    tables = sums.tables()
    assert tuple(tables) == kinds
    everywhere = range(2**31)
    positions = positions_of(batches, everywhere)
    for kind in kinds:
        (table,) = tables[kind]
        assert table.head.tolist() == list(HEADS[kind])
        assert set(table.bucket.tolist()) == {NO_BUCKET} and not table.pre_rope.any()
        for row, head in enumerate(HEADS[kind]):
            vectors = tokens_of(batches, kind, head, everywhere)
            keys = None
            if kind == "q" and "k" in kinds:
                keys = tokens_of(batches, "k", head // 2, everywhere)
            assert_moments(table, row, vectors, positions, keys, within=2e-6)


@pytest.mark.parametrize("sampler", ["uniform", "log_uniform"])
def test_buckets_are_summed_by_themselves(sampler: str) -> None:
    torch.manual_seed(1)
    sums = MomentSums(streams("q"), build_sampler(sampler, 1.0, 16))
    batches = [batch(("q",)), batch(("q",))]
    for states in batches:
        sums.begin_batch(LENGTHS)
        add(sums, states, cuts=(20, 50))
        sums.end_batch()
    table = joined(sums.tables()["q"])
    buckets = {
        "uniform": {number: range(16 * number, 16 * number + 16) for number in range(5)},
        "log_uniform": {4: range(31), 5: range(31, 63), 6: range(63, 127)},
    }[sampler]
    for row in range(len(table)):
        bucket = buckets[int(table.bucket[row])]
        vectors = tokens_of(batches, "q", int(table.head[row]), bucket)
        assert_moments(table, row, vectors, positions_of(batches, bucket), within=2e-6)
    assert len(table) == 3 * len(buckets)
    whole = table.summed(table.head.astype(np.int64))
    for row, head in enumerate(HEADS["q"]):
        vectors = tokens_of(batches, "q", head, range(2**31))
        assert_moments(whole, row, vectors, positions_of(batches, range(2**31)), within=2e-6)


@contextmanager
def allowed(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


BOUNDS = [(torch.float32, 1e4, 2e-6), (torch.float64, 1e4, 1e-11), (torch.bfloat16, 100.0, 5e-6)]
"""How far sums of products may be off, beside the sum of their sizes; the last is of vectors that the
format has rounded already."""


@pytest.mark.parametrize("jump", [False, True], ids=["steady", "jump"])
@pytest.mark.parametrize("dtype, mean, within", BOUNDS, ids=["float32", "float64", "bfloat16"])
def test_large_means_cost_nothing(dtype: torch.dtype, mean: float, within: float, jump: bool) -> None:
    """Of 10,000 times the deviation; and where one text lies as far from the others."""
    torch.manual_seed(2)
    sums = MomentSums(streams("q", "k"), cross=True)
    means = [mean, -mean if jump else mean]
    batches = [batch(("q", "k"), dtype=dtype, mean=value) for value in means]
    with allowed("medium"):
        for states in batches:
            sums.begin_batch(LENGTHS)
            add(sums, states)
            sums.end_batch()
    (table,) = sums.tables()["q"]
    positions = positions_of(batches, range(2**31))
    for row, head in enumerate(HEADS["q"]):
        vectors = tokens_of(batches, "q", head, range(2**31))
        assert_moments(table, row, vectors, positions, within=within)
        eigenvalues = np.linalg.eigvalsh(table.products[row])
        assert eigenvalues.min() >= -1e-9 * eigenvalues.max()


def test_the_order_of_texts_does_not_matter() -> None:
    """Nor which are read together, beyond the rounding of float64."""
    torch.manual_seed(3)
    states = batch(("q", "k"), dtype=torch.float64)
    together = MomentSums(streams("q", "k"), cross=True)
    together.begin_batch(LENGTHS)
    add(together, states)
    together.end_batch()
    alone = MomentSums(streams("q", "k"), cross=True)
    for number in reversed(range(len(LENGTHS))):
        alone.begin_batch(LENGTHS[number : number + 1])
        add(alone, {kind: values[number : number + 1] for kind, values in states.items()}, cuts=(9,))
        alone.end_batch()
    for kind in ("q", "k"):
        assert_same(joined(together.tables()[kind]), joined(alone.tables()[kind]))


def assert_same(table: MomentTable, other: MomentTable) -> None:
    for name, column in table.columns.items():
        scale = np.abs(column.astype(float)).max(initial=1e-300)
        assert np.allclose(column, other.columns[name], rtol=1e-10, atol=1e-13 * scale), name


def test_what_failed_in_the_middle_is_forgotten() -> None:
    torch.manual_seed(4)
    states = batch(("q", "k"), n_sequences=4, dtype=torch.float64)

    def part(start: int, stop: int) -> dict[Kind, Tensor]:
        return {kind: values[start:stop] for kind, values in states.items()}

    sums = MomentSums(streams("q", "k"))
    sums.begin_batch(LENGTHS[:4])
    # All four do not fit, then two do, and of the others one by one.
    sums.add(0, states, range(4), range(73))
    sums.begin_part(range(2))
    sums.add(0, part(0, 2), range(2), range(73))
    sums.begin_part(range(2, 4))
    assert not sums.is_whole
    sums.add(
        0, {"q": part(2, 4)["q"][:, :, :30], "k": part(2, 4)["k"][:, :, :30]}, range(2, 4), range(30)
    )
    for number in (2, 3):
        sums.begin_part(range(number, number + 1))
        sums.add(0, part(number, number + 1), range(number, number + 1), range(73))
    sums.end_batch()
    assert sums.is_whole
    # A batch that was given up before any of it counted.
    sums.begin_batch(LENGTHS[:4])
    sums.add(0, states, range(4), range(73))
    sums.begin_batch(LENGTHS[:4])
    expected = MomentSums(streams("q", "k"))
    expected.begin_batch(LENGTHS[:4])
    add(expected, states)
    expected.end_batch()
    for kind in ("q", "k"):
        assert_same(joined(sums.tables()[kind]), joined(expected.tables()[kind]))


def test_stages_and_layers_are_rows_of_their_own() -> None:
    torch.manual_seed(5)
    layers = [AttentionLayer(number, 4, 2, width) for number, width in ((3, 12), (7, 6))]
    own = [CapturedStream(layer, kind, HEADS[kind]) for layer in layers for kind in ("q", "k")]
    states: Any = {
        layer.layer_idx: {kind: torch.randn(1, N_HEADS[kind], 9, layer.head_dim) for kind in ("q", "k")}
        for layer in layers
    }
    for pre_rope in (True, False):
        sums = MomentSums(own, pre_rope=pre_rope)
        sums.begin_batch([9])
        for layer_idx, vectors in states.items():
            sums.add(layer_idx, vectors, range(1), range(9))
            sums.add(layer_idx, vectors, range(1), range(9), pre_rope=True)
        sums.end_batch()
        tables = sums.tables()["q"]
        assert [(table.width, set(table.layer_idx.tolist())) for table in tables] == [
            (12, {3}),
            (6, {7}),
        ]
        for table in tables:
            assert len(table) == (6 if pre_rope else 3)
            assert table.pre_rope.sum() == (3 if pre_rope else 0)


def test_tables_stay_as_they_are() -> None:
    """They are written while the next batch is summed."""
    sums = MomentSums(streams("q"))
    states = batch(("q",), n_sequences=1)
    sums.begin_batch([70])
    add(sums, states)
    sums.end_batch()
    (table,) = sums.tables()["q"]
    before = table.products.copy()
    sums.begin_batch([70])
    add(sums, batch(("q",), n_sequences=1))
    sums.end_batch()
    assert np.array_equal(table.products, before) and table.count.tolist() == [70] * 3


def test_tiles_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where their products are had in float32; here float32 multiplies the same."""
    laid: set[torch.dtype] = set()

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        laid.add(right.dtype)
        return torch.bmm(left.mT.float(), right.float())

    monkeypatch.setattr(tiles, "working_dtype", lambda _, dtype: dtype)
    monkeypatch.setattr(tiles, "_product", multiply)
    torch.manual_seed(6)
    sums = MomentSums(streams("q", "k"), cross=True)
    batches = [batch(("q", "k"), dtype=torch.bfloat16, mean=20.0) for _ in range(3)]
    # Positions of three digits.
    first = 70_000
    for states in batches:
        sums.begin_batch([first + length for length in LENGTHS])
        sums.add(0, states, range(5), range(first, first + 73))
        sums.end_batch()
    assert laid == {torch.bfloat16}
    (table,) = sums.tables()["q"]
    for row, head in enumerate(HEADS["q"]):
        vectors = tokens_of(batches, "q", head, range(2**31))
        keys = tokens_of(batches, "k", head // 2, range(2**31))
        positions = [first + position for position in positions_of(batches, range(2**31))]
        assert_moments(table, row, vectors, positions, keys, within=1e-3)


def test_a_batch_that_was_given_up_when_some_of_it_counted_is_not_forgotten_in_silence() -> None:
    sums = MomentSums(streams("q"))
    states = batch(("q",), n_sequences=2)
    sums.begin_batch(LENGTHS[:2])
    for number in range(2):
        sums.begin_part(range(number, number + 1))
        sums.add(0, {"q": states["q"][number : number + 1]}, range(number, number + 1), range(73))
    with pytest.raises(RuntimeError, match="can't be taken back"):
        sums.begin_batch(LENGTHS[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_far_from_the_start_cost_nothing(dtype: torch.dtype) -> None:
    """Where a bucket is narrow, too."""
    torch.manual_seed(7)
    first = 122_880
    sums = MomentSums(streams("k"), build_sampler("uniform", 1.0, 16))
    states = torch.randn(1, 2, 64, 12, dtype=dtype)
    sums.begin_batch([first + 64])
    sums.add(0, {"k": states}, range(1), range(first, first + 64))
    sums.end_batch()
    table = joined(sums.tables()["k"])
    for row in range(len(table)):
        start = 16 * int(table.bucket[row]) - first
        vectors = states[0, int(table.head[row]), start : start + 16].double().numpy()
        positions = [*range(first + start, first + start + 16)]
        assert_moments(table, row, vectors, positions, within=2e-6)


def test_tokens_far_from_all_others_cost_little() -> None:
    torch.manual_seed(8)
    states = torch.randn(1, 2, 4096, 12)
    states[:, :, ::8] += 1e4
    sums = MomentSums(streams("k"))
    sums.begin_batch([4096])
    sums.add(0, {"k": states}, range(1), range(4096))
    sums.end_batch()
    (table,) = sums.tables()["k"]
    for row in range(2):
        vectors = states[0, row].double().numpy()
        assert_moments(table, row, vectors, [*range(4096)], within=1e-5)

"""Statistics of the softmax of kept queries, against all probabilities in float64."""

import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qk_sniffer.capture import (
    SOFTMAX_BYTES,
    AttentionLayer,
    CapturedStream,
    SoftmaxInput,
    softmax,
)
from qk_sniffer.capture.plan import KeptQueries, KeptRows
from qk_sniffer.capture.softmax import SoftmaxStatistics

LOCAL = 6


class Kept(KeptRows):
    """The kept queries of a layer 0."""

    def __init__(self, queries: KeptQueries) -> None:
        super().__init__({(0, "softmax"): 0}, [len(queries.columns)])
        self._queries = queries

    def queries(self, stream: Any) -> KeptQueries:
        return self._queries

    def _places(self) -> tuple[Tensor, Tensor]:
        raise AssertionError


def kept_of(*rows: tuple[int, list[int]], past: int = 0) -> KeptQueries:
    """The queries at some columns of some sequences, whose texts begin at their first place."""
    sequences = np.concatenate([np.full(len(columns), number) for number, columns in rows])
    columns = np.concatenate([np.array(columns, np.int64) for _, columns in rows])
    return KeptQueries(sequences, columns, columns + past, columns + past)


def statistics(
    given: SoftmaxInput, queries: KeptQueries, heads: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
) -> Tensor:
    shape = given.query.shape
    layer = AttentionLayer(0, shape[1], given.key.shape[1], shape[3])
    stream = CapturedStream(layer, "softmax", heads)
    found = SoftmaxStatistics([stream], LOCAL).of(0, given, Kept(queries))
    assert found is not None
    return found


def expected(given: SoftmaxInput, queries: KeptQueries, head: int) -> Tensor:
    """(N, 6), from the probabilities of all keys in float64."""
    group = given.query.shape[1] // given.key.shape[1]
    n_keys = given.key.shape[2]
    rows = []
    for sequence, column, position, n_before in zip(
        queries.sequences, queries.columns, queries.positions, queries.n_before, strict=True
    ):
        query = given.query[sequence, head, column].double()
        scores = given.key[sequence, head // group].double() @ query * given.scaling
        if given.softcap is not None:
            scores = given.softcap * torch.tanh(scores / given.softcap)
        if given.bias is not None:
            bias = given.bias.expand(given.query.shape[0], -1, given.query.shape[2], -1)
            scores = scores + bias[sequence, head, column, :n_keys]
        own = column + min(given.past_length, n_keys - given.query.shape[2])
        distance = own - torch.arange(n_keys)
        allowed = (distance >= 0) & (distance <= n_before)
        if given.mask is not None:
            mask = given.mask.expand(given.query.shape[0], given.query.shape[1], -1, -1)
            row = mask[sequence, head, column, :n_keys]
            scores = torch.where(row, scores, -torch.inf) if row.dtype == torch.bool else scores + row
        elif given.chunked:
            assert given.window is not None
            allowed &= distance <= n_before % given.window
        elif given.window is not None:
            allowed &= distance < given.window
        scores = scores.masked_fill(~allowed, -torch.inf)
        sink = None if given.sinks is None else given.sinks.flatten()[head].double()
        everything = scores if sink is None else torch.cat([scores, sink[None]])
        lse = everything.logsumexp(0)
        p = (scores - lse).exp()
        first = own - n_before
        at_sink = (p[first] if first >= 0 else 0) + (0 if sink is None else (sink - lse).exp())
        argmax = position - distance[p.argmax()]
        local = p[(distance >= 0) & (distance < LOCAL)].sum()
        values = [lse, torch.special.entr(p).sum(), p.max(), argmax, at_sink, local]
        rows.append(torch.tensor([float(value) for value in values], dtype=torch.float64))
    return torch.stack(rows)


def assert_right(
    given: SoftmaxInput, queries: KeptQueries, heads: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
) -> None:
    found = statistics(given, queries, heads)
    assert found.shape == (len(heads), len(queries.columns), 6)
    for number, head in enumerate(heads):
        values = found[number].double()
        values[:, 3] = found[number, :, 3].contiguous().view(torch.int32).double()
        torch.testing.assert_close(values, expected(given, queries, head), atol=1e-5, rtol=1e-5)


def states(n_queries: int = 40, n_keys: int = 40, *, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Queries of six heads and keys of three, of three sequences."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, n_queries, 6, 8, generator=generator).transpose(1, 2) * scale
    key = torch.randn(3, n_keys, 3, 8, generator=generator).transpose(1, 2)
    return query, key


ROWS = kept_of((0, [0, 3, 17, 39]), (2, [5, 6, 30]))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"softcap": 2.5},
    "window": {"window": 7},
    "chunks": {"window": 9, "chunked": True},
    "sinks": {"sinks": torch.linspace(-2, 3, 6).view(1, 6, 1, 1)},
    "slopes": {"bias": -torch.rand(1, 6, 1, 40) * torch.arange(40)},
    "bias": {"bias": torch.randn(3, 6, 40, 50)},
    "mask": {"mask": (torch.rand(3, 1, 40, 40) < 0.7) | torch.eye(40, dtype=torch.bool)},
    "added mask": {"mask": torch.randn(1, 6, 40, 44)},
    "all": {
        "softcap": 3.0,
        "window": 7,
        "sinks": torch.zeros(1, 6, 1, 1),
        "bias": torch.randn(1, 6, 40, 40),
    },
}


@pytest.mark.parametrize("heads", [(0, 1, 2, 3, 4, 5), (1,), (0, 1, 5), (2, 4, 5)])
@pytest.mark.parametrize("tiles", ["one", "few keys", "few queries", "few of both"])
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_probabilities(
    case: str, tiles: str, heads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles in ("few keys", "few of both"):
        monkeypatch.setattr(softmax, "MOST_KEY_NUMBERS", 3 * 8 * 5)
    if tiles in ("few queries", "few of both"):
        monkeypatch.setattr(softmax, "MOST_SCORES", 6 * 40)
    query, key = states()
    assert_right(SoftmaxInput(query, key, 0, 0.35, **CASES[case]), ROWS, heads)


@pytest.mark.parametrize("n_keys", [40, 19, 64], ids=["dynamic", "trimmed", "static"])
@pytest.mark.parametrize("window", [None, 8])
def test_keys_of_a_cache_count(n_keys: int, window: int | None) -> None:
    """A dynamic cache, one that keeps a window, and a static one with places behind the call."""
    query, key = states(12, n_keys)
    past = 28
    rows = kept_of((0, [0, 11]), (1, [4]), (2, [0, 1, 2]), past=past)
    if n_keys == 19 and window is None:
        window = 8
    assert_right(SoftmaxInput(query, key, past, 0.35, window=window), rows)


def test_queries_may_be_in_any_order_and_texts_begin_anywhere() -> None:
    query, key = states()
    columns = np.array([39, 5, 20, 21])
    rows = KeptQueries(
        np.array([2, 0, 1, 0]), columns, np.array([7, 5, 3, 100]), np.array([9, 5, 3, 21])
    )
    assert_right(SoftmaxInput(query, key, 0, 0.35), rows)


def test_positions_of_keys_may_have_gaps() -> None:
    query, key = states(6, 14)
    positions = torch.arange(14).expand(3, -1).clone()
    positions[1] = torch.tensor([-1, -1, 0, 1, 2, -1, -1, -1, 3, 4, 5, 6, 7, 8])
    mask = (positions >= 0)[:, None, None].expand(3, 1, 6, 14) | torch.eye(14, dtype=torch.bool)[8:]
    rows = KeptQueries(
        np.array([1, 1]), np.array([0, 5]), np.array([3, 8]), np.array([6, 11]), positions
    )
    given = SoftmaxInput(query, key, 8, 0.35, mask=mask)
    found, plain = statistics(given, rows), expected(given, rows, 2)
    keys = found[2, :, 3].contiguous().view(torch.int32)
    wanted = [positions[1, int(k)] for k in plain[:, 3] - torch.tensor([3, 8]) + torch.tensor([8, 13])]
    assert keys.tolist() == [int(k) for k in wanted]
    torch.testing.assert_close(found[2, :, 0].double(), plain[:, 0], atol=1e-5, rtol=1e-5)


def test_scores_may_be_large() -> None:
    query, key = states(scale=300.0)
    assert_right(SoftmaxInput(query, key, 0, 1.0), ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    query, key = (tensor.to(dtype) for tensor in states())
    assert_right(SoftmaxInput(query, key, 0, 0.35), ROWS)


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that are there at once, but for known ones."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: Any = weakref.WeakSet(t.untyped_storage() for t in known if t is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
                self.most = max(self.most, self.now)
        return result

    def _free(self, n_bytes: int) -> None:
        self.now -= n_bytes


SHAPES = {
    # Sequences, query heads, key heads, tokens, head_dim, kept queries of each.
    "8B at 128k": (1, 32, 8, 131072, 128, 64),
    "8B at 16k, all": (1, 32, 8, 16384, 128, 2048),
    "many short": (64, 9, 3, 512, 64, 40),
    "MHA": (2, 64, 64, 8192, 128, 9),
    "MLA": (1, 128, 128, 32768, 192, 4),
    "wide": (1, 8, 1, 65536, 512, 100),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_bounded_and_no_value_is_looked_at(shape: str, masked: bool) -> None:
    """On the meta device there are no values; what is held is what an accelerator would hold."""
    size, heads, key_heads, length, width, n_kept = SHAPES[shape]
    mask = None
    if masked:
        mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
    given = SoftmaxInput(
        torch.empty(size, heads, length, width, dtype=torch.bfloat16, device="meta"),
        torch.empty(size, key_heads, length, width, dtype=torch.bfloat16, device="meta"),
        0,
        0.1,
        softcap=30.0,
        mask=mask,
    )
    columns = np.linspace(0, length - 1, n_kept).astype(int).tolist()
    rows = kept_of(*((number, columns) for number in range(size)))
    for some in (range(heads), range(0, heads, 3)):
        with Held(given.query, given.key, mask) as held:
            found = statistics(given, rows, tuple(some))
        assert held.most - found.nbytes <= SOFTMAX_BYTES, f"{held.most / 2**20:.0f} MiB"


def test_heads_of_a_group_that_are_not_captured_cost_nothing() -> None:
    layer = AttentionLayer(0, 6, 3, 8)
    for heads in itertools.combinations(range(6), 2):
        found = softmax._Heads.of(CapturedStream(layer, "softmax", heads))
        assert [found.query[i] for i in found.own] == list(heads)
        assert len(found.query) == len(found.key) * (2 if len(found.key) == 1 else 1)

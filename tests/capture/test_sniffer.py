"""The sniffer on tensors whose values say where they came from."""

import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from qk_sniffer.capture import (
    AttentionLayer,
    CapturedHeads,
    Chunks,
    Selection,
    Sniffer,
    active_sniffer,
    build_sampler,
    captured_streams,
    get_active_sniffer,
)
from qk_sniffer.kinds import Kind

LAYERS = {
    0: CapturedHeads(AttentionLayer(0, 4, 2, 3), query=(1, 3), key=(0, 1)),
    2: CapturedHeads(AttentionLayer(2, 4, 2, 3), query=(0,), key=(0,)),
}


def states(batch: int, heads: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, S, 3): every vector is its own (batch row, head, position)."""
    grid = torch.meshgrid(torch.arange(batch), torch.arange(heads), torch.arange(length), indexing="ij")
    return torch.stack(grid, dim=-1).to(dtype)


def sniff(
    lengths: list[int],
    example_ids: list[int],
    base_rate: float = 1.0,
    kinds: Iterable[Kind] = ("q", "k"),
) -> tuple[Sniffer, Chunks]:
    chunks = Chunks()
    selection = Selection(build_sampler("uniform", base_rate, 4))
    sniffer = Sniffer(captured_streams(LAYERS, kinds), selection, chunks)
    sniffer.begin_batch(example_ids, lengths)
    length = max(lengths)
    for layer in range(3):
        sniffer.capture(
            layer,
            states(len(lengths), 4, length),
            states(len(lengths), 2, length),
            torch.arange(length),
        )
    sniffer.flush_batch()
    return sniffer, chunks


def test_each_vector_is_that_of_its_head_text_and_position() -> None:
    lengths, ids = [20, 9, 40], [70, -5, 3]
    sniffer, chunks = sniff(lengths, ids)
    assert [(c.layer_idx, c.kind) for c in chunks] == [(0, "q"), (0, "k"), (2, "q"), (2, "k")]
    for chunk in chunks:
        heads = LAYERS[chunk.layer_idx].query if chunk.kind == "q" else LAYERS[chunk.layer_idx].key
        rows = [ids.index(i) for i in chunk.example_ids.tolist()]
        assert all(p < lengths[r] for r, p in zip(rows, chunk.positions.tolist(), strict=True))
        for head, vectors in zip(heads, chunk.vectors, strict=True):
            expected = [[r, head, p] for r, p in zip(rows, chunk.positions.tolist(), strict=True)]
            assert vectors.tolist() == expected
        assert chunk.buckets.tolist() == [p // 4 for p in chunk.positions.tolist()]
    assert sniffer.rows_kept == sum(c.vectors.shape[0] * c.vectors.shape[1] for c in chunks) > 0


def test_layers_and_kinds_have_draws_of_their_own() -> None:
    _, chunks = sniff([400], [0])
    draws = {tuple(chunk.positions.tolist()) for chunk in chunks}
    assert len(draws) == 4


def test_all_positions_when_the_rate_is_that_of_the_bucket() -> None:
    _, chunks = sniff([3, 5], [0, 1], base_rate=4.0)
    assert chunks[0].example_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert chunks[0].positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["q", "k"])
def test_queries_or_keys_alone(kind: Kind) -> None:
    _, chunks = sniff([40], [0], kinds=[kind])
    assert {chunk.kind for chunk in chunks} == {kind}


def test_the_dtype_of_the_model_is_kept() -> None:
    chunks = Chunks()
    sniffer = Sniffer(captured_streams({0: LAYERS[0]}), Selection(build_sampler("all", 1.0, 4)), chunks)
    sniffer.begin_batch([0], [5])
    query, key = states(1, 4, 5, torch.bfloat16), states(1, 2, 5, torch.bfloat16)
    sniffer.capture(0, query, key, torch.arange(5))
    sniffer.flush_batch()
    assert {chunk.vectors.dtype for chunk in chunks} == {torch.bfloat16}


def test_captured_rows_are_copies() -> None:
    chunks = Chunks()
    sniffer = Sniffer(captured_streams({0: LAYERS[0]}), Selection(build_sampler("all", 1.0, 4)), chunks)
    sniffer.begin_batch([0], [5])
    query, key = states(1, 4, 5), states(1, 2, 5)
    sniffer.capture(0, query, key, torch.arange(5))
    query.zero_()
    key.zero_()
    sniffer.flush_batch()
    assert all(
        chunk.vectors[1, 4].tolist() == [0, h, 4] for chunk, h in zip(chunks, (3, 1), strict=True)
    )


def all_of_layer_0(lengths: list[int]) -> tuple[Sniffer, Chunks]:
    chunks = Chunks()
    sniffer = Sniffer(captured_streams({0: LAYERS[0]}), Selection(build_sampler("all", 1.0, 4)), chunks)
    sniffer.begin_batch(list(range(len(lengths))), lengths)
    return sniffer, chunks


def test_a_layer_that_runs_twice_is_a_bug() -> None:
    sniffer, _ = all_of_layer_0([5])
    sniffer.capture(0, states(1, 4, 5), states(1, 2, 5), torch.arange(5))
    with pytest.raises(
        RuntimeError, match="layer 0: 5 queries at positions 0 to 4 came after 5 tokens"
    ):
        sniffer.capture(0, states(1, 4, 5), states(1, 2, 5), torch.arange(5))


@pytest.mark.parametrize("read", [0, 4])
def test_a_layer_that_misses_tokens_is_a_bug(read: int) -> None:
    sniffer, _ = all_of_layer_0([5])
    if read:
        sniffer.capture(0, states(1, 4, read), states(1, 2, read), torch.arange(read))
    with pytest.raises(RuntimeError, match=f"layer 0 was captured for {read} of 5 tokens"):
        sniffer.flush_batch()


def test_a_gap_between_passages_is_a_bug() -> None:
    sniffer, _ = all_of_layer_0([9])
    sniffer.capture(0, states(1, 4, 4), states(1, 2, 4), torch.arange(4))
    with pytest.raises(RuntimeError, match="positions 5 to 8 came after 4 tokens"):
        sniffer.capture(0, states(1, 4, 4), states(1, 2, 9), torch.arange(5, 9))


@pytest.mark.parametrize("cache", ["dynamic", "sliding", "static"])
@pytest.mark.parametrize("passage", [1, 3, 4, 20])
def test_passages_with_a_cache_give_the_rows_of_one_call(cache: str, passage: int) -> None:
    lengths = [17, 20, 3]
    sniffer, whole = all_of_layer_0(lengths)
    query, key = states(3, 4, 20), states(3, 2, 20)
    sniffer.capture(0, query, key, torch.arange(20))
    sniffer.flush_batch()
    sniffer, parts = all_of_layer_0(lengths)
    for start in range(0, 20, passage):
        stop = min(start + passage, 20)
        held = {
            "dynamic": slice(0, stop),
            "sliding": slice(max(0, start - 5), stop),
            "static": slice(20),
        }
        keys = key[:, :, held[cache]].clone()
        if cache == "static":
            keys[:, :, stop:] = -1
        sniffer.capture(0, query[:, :, start:stop], keys, torch.arange(start, stop))
    sniffer.flush_batch()
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.vectors, other.vectors)
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.example_ids, other.example_ids)
        assert torch.equal(one.buckets, other.buckets)


def test_sequences_may_end_before_their_announced_length() -> None:
    sniffer, chunks = all_of_layer_0([20, 20])
    sniffer.capture(0, states(2, 4, 12), states(2, 2, 12), torch.arange(12))
    sniffer.flush_batch([12, 9])
    assert [chunk.positions.tolist() for chunk in chunks] == [[*range(12), *range(9)]] * 2
    assert sniffer.rows_kept == sum(c.vectors.shape[0] * c.vectors.shape[1] for c in chunks)


def test_the_active_sniffer_ends_with_its_block() -> None:
    sniffer, _ = sniff([3], [0])
    with pytest.raises(ValueError, match="in the forward"), active_sniffer(sniffer):
        assert get_active_sniffer() is sniffer
        raise ValueError("in the forward")
    assert get_active_sniffer() is None


def test_capture_imports_neither_lightning_nor_arrow_nor_transformers() -> None:
    code = (
        "import sys, qk_sniffer.capture; "
        "print(sorted({'lightning', 'pyarrow', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

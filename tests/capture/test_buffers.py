"""Buffers that vectors pass through, with an accelerator's code and smaller than what they carry."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qk_sniffer.capture import (
    AttentionLayer,
    BatchRows,
    CapturedHeads,
    Chunks,
    Portion,
    Selection,
    Sniffer,
    build_sampler,
    captured_streams,
)
from qk_sniffer.capture import buffers as buffers_module
from qk_sniffer.capture.buffers import ALIGNMENT, N_BUFFERS, Staging, upload

CPU = torch.device("cpu")
LAYERS = {
    layer_idx: CapturedHeads(AttentionLayer(layer_idx, 4, 2, width), query=(1, 3), key=(0,))
    for layer_idx, width in ((0, 3), (1, 16))
}
LENGTHS = [37, 9, 30]
DTYPES = {0: torch.bfloat16, 1: torch.float32}
SMALL = 8 * ALIGNMENT


@pytest.fixture(params=["the host's", "an accelerator's"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Takes the CPU for an accelerator: gathers, copies and events are those of CUDA."""
    if request.param == "an accelerator's":
        monkeypatch.setattr(buffers_module, "needs_copy", lambda device: True)
    return str(request.param)


@pytest.fixture(params=[64 * 2**20, SMALL])
def buffer_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(buffers_module, "BUFFER_BYTES", request.param)
    return int(request.param)


def states(layer_idx: int, n_heads: int) -> Tensor:
    """(3, n_heads, 37, head_dim), the same at each call."""
    generator = torch.Generator().manual_seed(10 * layer_idx + n_heads)
    width = LAYERS[layer_idx].layer.head_dim
    return torch.randn(3, n_heads, 37, width, generator=generator).to(DTYPES[layer_idx])


def read(sniffer: Sniffer, passage: int = 37) -> None:
    for start in range(0, 37, passage):
        stop = min(start + passage, 37)
        for layer_idx in LAYERS:
            query, key = states(layer_idx, 4)[:, :, start:stop], states(layer_idx, 2)[:, :, :stop]
            sniffer.capture(layer_idx, query, key, torch.arange(start, stop))


class Counting(Chunks):
    """Counts the bytes that come."""

    n_bytes = 0

    def take_vectors(self, portion: Portion) -> None:
        self.n_bytes += portion.n_bytes
        super().take_vectors(portion)


@pytest.mark.parametrize("passage", [37, 10])
@pytest.mark.parametrize("sampler", ["uniform", "all"])
def test_every_vector_arrives(sampler: str, passage: int, buffer_bytes: int, device: str) -> None:
    chunks = Counting()
    sniffer = Sniffer(captured_streams(LAYERS), Selection(build_sampler(sampler, 5.0, 8)), chunks)
    for first in (5, 8):
        sniffer.begin_batch([first, first + 1, first + 2], LENGTHS)
        read(sniffer, passage)
        sniffer.flush_batch()
    assert [(c.layer_idx, c.kind) for c in chunks] == 2 * [(0, "q"), (0, "k"), (1, "q"), (1, "k")]
    for number, chunk in enumerate(chunks):
        captured = LAYERS[chunk.layer_idx]
        heads, whole = (captured.query, 4) if chunk.kind == "q" else (captured.key, 2)
        places = (chunk.example_ids - (5 if number < 4 else 8)).long()
        expected = states(chunk.layer_idx, whole)[places, :, chunk.positions.long()]
        assert torch.equal(chunk.vectors, expected[:, heads].transpose(0, 1))
        if sampler == "all":
            assert chunk.positions.tolist() == [*range(37), *range(9), *range(30)]
    assert len(sniffer._staging._side_streams) == (device == "an accelerator's")
    # Nothing comes that nobody has gathered, but for what aligns a call's vectors.
    n_calls = len(chunks) * -(-37 // passage)
    assert 0 <= chunks.n_bytes - sum(chunk.vectors.nbytes for chunk in chunks) < n_calls * ALIGNMENT


@pytest.mark.parametrize("sampler", ["uniform", "all"])
def test_batches_can_be_handed_on_together(sampler: str, buffer_bytes: int, device: str) -> None:
    """Also where one between them is given up."""
    chunks = Chunks()
    sniffer = Sniffer(captured_streams(LAYERS), Selection(build_sampler(sampler, 5.0, 8)), chunks)
    for first in (5, 50, 8):
        sniffer.begin_batch([first, first + 1, first + 2], LENGTHS)
        read(sniffer, 10)
        if first != 50:
            sniffer.flush_batch(hand_on=False)
    assert chunks == []
    sniffer.close()
    sniffer.hand_on()
    assert [(c.layer_idx, c.kind) for c in chunks] == [(0, "q"), (0, "k"), (1, "q"), (1, "k")]
    for chunk in chunks:
        captured = LAYERS[chunk.layer_idx]
        heads, whole = (captured.query, 4) if chunk.kind == "q" else (captured.key, 2)
        assert sorted(chunk.example_ids.unique().tolist()) == [5, 6, 7, 8, 9, 10]
        places = (chunk.example_ids - 5).long() % 3
        expected = states(chunk.layer_idx, whole)[places, :, chunk.positions.long()]
        assert torch.equal(chunk.vectors, expected[:, heads].transpose(0, 1))
        if sampler == "all":
            assert chunk.positions.tolist() == 2 * [*range(37), *range(9), *range(30)]
    kept = sniffer.rows_kept
    sniffer.hand_on()
    assert len(chunks) == 4 and kept == sum(c.vectors.shape[0] * c.vectors.shape[1] for c in chunks)


ALIKE = {
    layer_idx: CapturedHeads(AttentionLayer(layer_idx, 4, 2, 16), query=(1, 3), key=(layer_idx % 2,))
    for layer_idx in range(6)
}


ODD_ONES = {(3, 1): "contiguous", (0, 2): "half", (5, 2): "contiguous", (2, 4): "half"}
"""Layers and batches whose queries lie otherwise in memory than those of their neighbours."""


@pytest.mark.parametrize("odd_ones", [{}, ODD_ONES])
@pytest.mark.parametrize("sampler", ["uniform", "all"])
@pytest.mark.parametrize("buffer", [64 * 2**20, 300 * ALIGNMENT, SMALL])
def test_layers_may_be_alike_or_change(
    sampler: str,
    buffer: int,
    odd_ones: dict[tuple[int, int], str],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is prepared for a layer fits it, or is made anew; and no room is left unused."""
    monkeypatch.setattr(buffers_module, "BUFFER_BYTES", buffer)
    chunks = Counting()
    sniffer = Sniffer(captured_streams(ALIKE), Selection(build_sampler(sampler, 5.0, 8)), chunks)
    expected = []
    for batch, length in enumerate([37, 20, 20, 37, 9, 37]):
        sniffer.begin_batch([2 * batch, 2 * batch + 1], [length, length - 4])
        for layer_idx in ALIKE:
            query, key = (torch.randn(2, length, n_heads, 16).transpose(1, 2) for n_heads in (4, 2))
            if (layer_idx, batch) in odd_ones:
                query = getattr(query, odd_ones[layer_idx, batch])()
            sniffer.capture(layer_idx, query, key, torch.arange(length))
            captured = ALIKE[layer_idx]
            expected += [query[:, captured.query], key[:, captured.key]]
        sniffer.flush_batch()
    for chunk, whole in zip(chunks, expected, strict=True):
        places = chunk.example_ids.long() % 2
        assert torch.equal(chunk.vectors, whole[places, :, chunk.positions.long()].transpose(0, 1))
    extra = chunks.n_bytes - sum(chunk.vectors.nbytes for chunk in chunks)
    # Each of the odd ones has been prepared once in vain, and so have its neighbours at the next batch.
    in_vain = 2 * len(odd_ones) * max(chunk.vectors.nbytes for chunk in chunks)
    assert 0 <= extra < len(chunks) * ALIGNMENT + in_vain


class Slow:
    """A sink that takes bytes in a thread of its own, when it is told to, and counts what waits."""

    def __init__(self) -> None:
        self.waiting: list[Portion] = []
        self.most = self.taken = 0
        self.come = threading.Semaphore(0)

    def take_vectors(self, portion: Portion) -> None:
        assert portion.start == self.taken + sum(other.n_bytes for other in self.waiting)
        assert portion.start % ALIGNMENT == 0
        self.waiting.append(portion)
        self.most = max(self.most, len(self.waiting))
        self.come.release()

    def take_rows(self, rows: BatchRows) -> None:
        last = rows.blocks[-1]
        size = last.n_heads * last.n_rows * last.head_dim * getattr(torch, last.dtype).itemsize
        self.n_bytes = last.vectors + size

    def release_one(self) -> None:
        self.come.acquire()
        portion = self.waiting.pop(0)
        self.taken += portion.n_bytes
        portion.release()


def test_memory_has_a_limit_and_the_forward_waits_there(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(buffers_module, "BUFFER_BYTES", SMALL)
    allocated: list[int] = []
    allocate = buffers_module._allocate

    def counting(*args: Any, **options: Any) -> Tensor:
        buffer = allocate(*args, **options)
        allocated.append(buffer.nbytes)
        return buffer

    monkeypatch.setattr(buffers_module, "_allocate", counting)
    sink = Slow()
    sniffer = Sniffer(captured_streams(LAYERS), Selection(build_sampler("all", 1.0, 8)), sink)
    sniffer.begin_batch([0, 1, 2], LENGTHS)

    def capture() -> None:
        read(sniffer)
        sniffer.flush_batch()

    thread = threading.Thread(target=capture, daemon=True)
    thread.start()
    thread.join(0.5)
    # All buffers are full, and nobody has taken one.
    assert thread.is_alive() and len(sink.waiting) == N_BUFFERS
    while thread.is_alive() or sink.waiting:
        sink.release_one()
        thread.join(0.01)
    assert sink.taken == sink.n_bytes > 5 * N_BUFFERS * SMALL
    assert sink.most == N_BUFFERS
    per_buffer = 2 if device == "an accelerator's" else 1
    assert sum(allocated) == per_buffer * N_BUFFERS * SMALL


def test_small_batches_use_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[str] = []

    def counting(*_: Any, **__: Any) -> Tensor:
        allocated.append("one")
        return torch.empty(2**20, dtype=torch.uint8)

    monkeypatch.setattr(buffers_module, "_allocate", counting)
    sniffer = Sniffer(captured_streams(LAYERS), Selection(build_sampler("uniform", 1.0, 8)), Chunks())
    for batch in range(5):
        sniffer.begin_batch([batch, -batch - 1, 100], LENGTHS)
        read(sniffer)
        sniffer.flush_batch()
    assert allocated == ["one"]


def test_a_batch_that_is_given_up_leaves_nothing_to_the_next() -> None:
    chunks = Chunks()
    sniffer = Sniffer(captured_streams(LAYERS), Selection(build_sampler("all", 1.0, 8)), chunks)
    for _ in range(2 * N_BUFFERS):
        sniffer.begin_batch([0, 1, 2], LENGTHS)
        read(sniffer)
    sniffer.close()
    assert chunks == []
    sniffer.begin_batch([0, 1, 2], LENGTHS)
    read(sniffer)
    sniffer.flush_batch()
    assert len(chunks) == 4
    assert torch.equal(chunks[0].vectors[0, :37], states(0, 4)[0, 1])


def test_padding_is_zero() -> None:
    portions: list[bytes] = []

    def take(portion: Portion) -> None:
        portions.append(portion.wait().tobytes())
        portion.wait()[:] = 255
        portion.release()

    staging = Staging(take)
    for _ in range(2):
        staging.clear()
        for number in (1, 2):
            assert staging.align() % ALIGNMENT == 0
            staging.room(CPU, torch.int16, 5, 3).fill_(number)
        staging.end()
    one, two = np.full(15, 1, np.int16).tobytes(), np.full(15, 2, np.int16).tobytes()
    assert portions == 2 * [one + bytes(ALIGNMENT - len(one)) + two]


def test_a_vector_wider_than_a_buffer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers_module, "BUFFER_BYTES", ALIGNMENT)
    with pytest.raises(ValueError, match="a vector of 72 bytes is wider than a buffer"):
        Staging(lambda portion: None).room(CPU, torch.float64, 1, 9)


def layouts() -> Iterator[Tensor]:
    """(2, 4, 6, 5) states as models give them: one memory layout after another."""
    values = torch.arange(2 * 4 * 6 * 5, dtype=torch.float32)
    yield values.view(2, 4, 6, 5)
    yield values.view(2, 6, 4, 5).transpose(1, 2)
    yield values.view(6, 2, 4, 5).permute(1, 2, 0, 3)
    yield values.view(2, 4, 5, 6).transpose(2, 3)
    yield values[:60].view(2, 1, 6, 5).expand(2, 4, 6, 5)
    yield torch.arange(2 * 6 * 4 * 15.0).view(2, 6, 4, 3, 5)[:, :, :, 1].transpose(1, 2)
    yield torch.arange(2 * 6 * 4 * 7.0).view(2, 6, 4, 7)[..., 2:].transpose(1, 2)
    yield torch.arange(3.0 + 2 * 4 * 9 * 5)[3:].view(2, 4, 9, 5)[:, :, 3:]
    yield values.view(2, 4, 6, 5).requires_grad_()


@pytest.mark.parametrize("number", range(9))
def test_any_layout_is_read_without_its_neighbours(number: int, device: str) -> None:
    query = list(layouts())[number]
    heads = {0: CapturedHeads(AttentionLayer(0, 4, 4, 5), query=(0, 2, 3), key=())}
    chunks = Chunks()
    sniffer = Sniffer(captured_streams(heads, ["q"]), Selection(build_sampler("all", 1.0, 8)), chunks)
    sniffer.begin_batch([0, 1], [6, 4])
    sniffer.capture(0, query, query, torch.arange(6))
    sniffer.flush_batch()
    expected = torch.cat([query[0, [0, 2, 3]], query[1, [0, 2, 3], :4]], dim=1)
    assert torch.equal(chunks[0].vectors, expected)
    assert not chunks[0].vectors.requires_grad


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 8), (3, 1, 1, 2), (1, 1, 5, 1)])
def test_axes_of_one(shape: tuple[int, int, int, int]) -> None:
    n_sequences, n_heads, length, width = shape
    layer = AttentionLayer(0, n_heads, n_heads, width)
    everything = tuple(range(n_heads))
    chunks = Chunks()
    sniffer = Sniffer(
        captured_streams({0: CapturedHeads(layer, everything, everything)}),
        Selection(build_sampler("all", 1.0, 8)),
        chunks,
    )
    query = torch.randn(shape)
    sniffer.begin_batch(range(n_sequences), [length] * n_sequences)
    sniffer.capture(0, query, query.transpose(0, 1).contiguous().transpose(0, 1), torch.arange(length))
    sniffer.flush_batch()
    expected = query.transpose(0, 1).reshape(n_heads, -1, width)
    assert all(torch.equal(chunk.vectors, expected) for chunk in chunks)


def test_on_the_cpu_nothing_is_uploaded() -> None:
    tensor = torch.randn(3)
    assert upload(tensor, CPU) is tensor


@pytest.mark.parametrize("sampler", ["all", "uniform", "log_uniform"])
def test_no_value_of_a_device_is_looked_at(
    sampler: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: whatever waits for one, on a device, raises."""
    portions: list[Portion] = []

    class Fake(Chunks):
        def take_vectors(self, portion: Portion) -> None:
            portions.append(portion)

        def take_rows(self, rows: BatchRows) -> None:
            assert [(b.layer_idx, b.kind) for b in rows.blocks] == 2 * [(0, "q"), (0, "k")]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    allocate = buffers_module._allocate

    def fake(*args: Any, **options: Any) -> Tensor:
        return mode.from_tensor(allocate(*args, **options))

    monkeypatch.setattr(buffers_module, "_allocate", fake)
    sniffer = Sniffer(
        captured_streams({0: LAYERS[0]}), Selection(build_sampler(sampler, 4.0, 8)), Fake()
    )
    sniffer.begin_batch([0, 1], [30, 22])
    for start, stop in ((0, 12), (12, 30)):
        query, key = (mode.from_tensor(torch.zeros(2, n_heads, 30, 3)) for n_heads in (4, 2))
        with pytest.raises(DataDependentOutputException):
            query.sum().item()
        sniffer.capture(0, query[:, :, start:stop], key[:, :, :stop], torch.arange(start, stop))
    sniffer.flush_batch()
    assert len(portions) == 1

"""Copies to the host, with the same code as on CUDA, and what a capture must never look at."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from qk_sniffer.capture import (
    AttentionLayer,
    CapturedHeads,
    Chunks,
    Sniffer,
    build_sampler,
)
from qk_sniffer.capture.transfer import HostCopies, HostCopy, upload

CPU = torch.device("cpu")
LAYER = {0: CapturedHeads(AttentionLayer(0, 4, 2, 3), query=(1, 3), key=(0,))}


def test_a_copy_on_a_side_stream_has_the_values_of_its_tensor() -> None:
    copies = HostCopies()
    tensors = [torch.randn(3, 5), torch.randn(2, 4).to(torch.bfloat16)]
    started = [copies.start_beside(tensor) for tensor in tensors]
    for copy, tensor in zip(started, tensors, strict=True):
        assert copy.copied is not None
        assert torch.equal(copy.wait(), tensor)
        assert copy.tensor.data_ptr() != tensor.data_ptr()
    assert len(copies._side_streams) == 1


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.randn(3)
    assert HostCopies().start(tensor).wait() is tensor
    assert upload(tensor, CPU) is tensor


@pytest.mark.parametrize("passage", [4, 9])
def test_chunks_over_a_side_stream_are_those_without(
    passage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Chunks:
        chunks = Chunks()
        sniffer = Sniffer(LAYER, build_sampler("uniform", 3.0, 4), 0, chunks)
        sniffer.begin_batch([5, 6], [9, 7])
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(2, heads, 9, 3, generator=generator) for heads in (4, 2))
        for start in range(0, 9, passage):
            stop = min(start + passage, 9)
            sniffer.capture(0, query[:, :, start:stop], key[:, :, :stop], torch.arange(start, stop))
        sniffer.flush_batch()
        return chunks

    plain = rows()
    monkeypatch.setattr(HostCopies, "start", HostCopies.start_beside)
    beside = rows()
    assert [c.kind for c in plain] == [c.kind for c in beside] == ["q", "k"]
    for one, other in zip(plain, beside, strict=True):
        assert all(copy.copied is not None for copy in other.copies)
        assert torch.equal(one.vectors, other.vectors)
        assert torch.equal(one.positions, other.positions)


def test_a_chunk_waits_for_each_of_its_copies() -> None:
    waited: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    copies = [HostCopy(torch.zeros(2, 3, 4), Event(number)) for number in range(2)]
    numbers = torch.arange(6, dtype=torch.int32)
    chunk = Chunk(0, "q", copies, None, numbers, None)
    assert chunk.n_bytes == 2 * 2 * 3 * 4 * 4
    assert waited == []
    assert chunk.vectors.shape == (2, 6, 4)
    assert waited == [0, 1]


@pytest.mark.parametrize("sampler", ["all", "uniform", "log_uniform"])
def test_no_value_of_a_device_is_looked_at(sampler: str) -> None:
    """Fake tensors have no values: whatever waits for one, on a device, raises."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    chunks = Chunks()
    sniffer = Sniffer(LAYER, build_sampler(sampler, 4.0, 8), 0, chunks)
    sniffer.begin_batch([0, 1], [30, 22])
    for start, stop in ((0, 12), (12, 30)):
        query, key = (
            mode.from_tensor(torch.zeros(2, 4, 18, 3)),
            mode.from_tensor(torch.zeros(2, 2, 30, 3)),
        )
        with pytest.raises(DataDependentOutputException):
            query.sum().item()
        sniffer.capture(0, query[:, :, : stop - start], key[:, :, :stop], torch.arange(start, stop))
    sniffer.flush_batch()
    assert [chunk.kind for chunk in chunks] == ["q", "k"]
    assert all(isinstance(copy.tensor, FakeTensor) for chunk in chunks for copy in chunk.copies)

"""What stands for a GPU where there is none: its host, which enqueues gathers that nobody does.

A tiny model of as many layers runs between the captures, as the launches of a real one do, and hands
on states of the real shape. What a capture adds is the host's work for it, but for the uploads of
places; and for `all` the writing, but for the copy to the host, which a GPU makes by itself. Both are
set against what a batch took on a GPU.
"""

import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch

from bench.gpu import CASES, Case, Table, module_of, plain_write
from families import HOST_BOUND, tiny_model
from qk_sniffer.capture import (
    BatchRows,
    CapturedHeads,
    Portion,
    Selection,
    Sniffer,
    buffers,
    captured_streams,
    heads_to_capture,
)
from qk_sniffer.capture.buffers import Buffer, Staging
from qk_sniffer.config import CaptureConfig
from qk_sniffer.models import attention_geometry, decoder_backbone
from qk_sniffer.models.attention import watch_attention
from qk_sniffer.storage import JournalWriter

PAIRS, WARM_UP = 40, 5
ON_AN_H100 = {
    ("SmolLM2-135M", 1024, 16): 529_109,
    ("SmolLM2-135M", 512, 1): 20_651,
    ("SmolLM2-135M", 1024, 4): 184_242,
    ("Llama-1B", 4096, 4): 176_772,
    ("Llama-1B", 4096, 2): 173_025,
    ("Qwen3-8B", 16384, 1): 25_175,
    ("Qwen3-8B", 2048, 1): 27_974,
    ("Qwen3-8B", 131072, 1): 10_033,
}
"""Tokens a second of a bare loop, by model, length and batch size: one H100, bfloat16, sdpa."""
HEAD = (
    "", "more, ms", "bare on an H100, ms", "so at most", "goal", "to disk, GB/s", "plain write, GB/s",
)  # fmt: skip


class ToJournal:
    """A sink that journals what comes, as a run does."""

    def __init__(self, directory: Path, heads: dict[int, CapturedHeads]) -> None:
        streams = [{"layer_idx": layer_idx, "kind": kind} for layer_idx in heads for kind in ("q", "k")]
        settings: dict[str, Any] = {"model": {}, "data": {}}
        self.journal = JournalWriter(directory, {"streams": streams, "settings": settings})
        self.n_bytes = 0

    def take_vectors(self, portion: Portion) -> None:
        self.n_bytes += portion.n_bytes
        self.journal.append(portion)

    def take_rows(self, rows: BatchRows) -> None:
        self.journal.commit(rows.blocks, rows.numbers.numpy(), [])


class WithoutCopies(Staging):
    """Its buffers have values from the start, since none comes from a device."""

    def __init__(self, take: Any) -> None:
        super().__init__(take)
        self._filled: set[Buffer] = set()

    def _copy(self, buffer: Buffer, n_bytes: int) -> None:
        if buffer not in self._filled:
            self._filled.add(buffer)
            buffer.host().random_()


class HostCost(NamedTuple):
    """More seconds of a batch, those of all batches with their writing, and what was written."""

    more: float
    seconds: float
    n_bytes: int


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Gathers are enqueued and done by nobody, by a call that takes a host as long."""
    select = torch.index_select
    one, place = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "index_select", lambda *_, **__: select(one, 0, place))
        patch.setattr(buffers, "needs_copy", lambda device: True)
        yield


def measure_host(case: Case, capture: CaptureConfig, pairs: int) -> HostCost:
    """Read a batch barely and with a capture, in turn."""
    skeleton = module_of(case, torch.device("meta")).backbone
    layers = attention_geometry(skeleton).layers
    heads = heads_to_capture(asdict(capture), layers)
    selection = Selection.of(asdict(capture))
    config = copy.deepcopy(HOST_BOUND)
    config.num_hidden_layers = len(layers)
    backbone = decoder_backbone(tiny_model(config).eval())
    # Never touched, and so without memory.
    shape, width = (case.batch_size, case.length), layers[0].head_dim
    query, key = (
        torch.empty(*shape, n_heads, width, dtype=torch.bfloat16).transpose(1, 2)
        for n_heads in (layers[0].num_attention_heads, layers[0].num_key_value_heads)
    )
    tokens, positions = torch.zeros(1, 128, dtype=torch.int64), torch.arange(case.length)
    lengths = [case.length] * case.batch_size
    batches = [
        range(number * case.batch_size, (number + 1) * case.batch_size)
        for number in range(pairs + WARM_UP)
    ]
    expected = ((ids, lengths) for ids in batches)
    bare, more = [], []
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode(), as_on_a_gpu():
        sink = ToJournal(Path(directory) / "journal", heads)
        sniffer = Sniffer(captured_streams(heads), selection, sink, expected=expected)
        sniffer._staging = sniffer._gathers._staging = WithoutCopies(sink.take_vectors)

        def report(layer_idx: int, *_: Any) -> None:
            sniffer.capture(layer_idx, query, key, positions)

        for example_ids in batches:
            started = time.perf_counter()
            backbone(input_ids=tokens, use_cache=False)
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()
            sniffer.begin_batch(example_ids, lengths)
            with watch_attention(backbone, report):
                backbone(input_ids=tokens, use_cache=False)
            sniffer.flush_batch(hand_on=sink.journal.is_due)
            more.append(time.perf_counter() - started - bare[-1])
        seconds = sum(more)
        started = time.perf_counter()
        sniffer.hand_on()
        sink.journal.close()
        seconds += time.perf_counter() - started
    # The mean, since a batch in some draws for those behind it too.
    return HostCost(mean(more[WARM_UP:]), seconds, sink.n_bytes)


def time_hosts(cases: list[Case], pairs: int) -> list[str]:
    """The lines of the table."""
    table = Table(*HEAD)
    for case in cases:
        for name, (capture, goal) in case.captures.items():
            cost = measure_host(case, capture, pairs if goal else 4)
            rate = ON_AN_H100.get((case.model, case.length, case.batch_size), 1)
            on_gpu = case.batch_size * case.length / rate
            cells = [f"{1 + cost.more / on_gpu:.3f}", f"{goal}", "", ""]
            if goal is None:
                plain = cost.n_bytes / plain_write(cost.n_bytes)
                written = cost.n_bytes / cost.seconds
                cells = ["", "", f"{written / 1e9:.2g}", f"{plain / 1e9:.2g}"]
            table.tell(
                f"{case.model}, {case.batch_size} x {case.length:,}, {name}",
                f"{1000 * cost.more:.1f}",
                f"{1000 * on_gpu:,.0f}",
                *cells,
            )
    return table.lines


def time_stand_in(repetitions: int) -> str:
    """Every case of the GPU's table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = time_hosts(CASES, repetitions * PAIRS)
    torch.set_num_threads(threads)
    text = (
        "What the host does more for a batch, and what the batch alone took on an H100: together the "
        "ratio if none of the host's work went on beside the GPU's. For `all`, what goes through the "
        "buffers to this disk, and a plain write of as much."
    )
    return "\n".join(["## A GPU's host", "", text, "", *lines])

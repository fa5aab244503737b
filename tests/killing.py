"""The command line in processes of its own, which die or stop at a moment or at a fault point.

A fork server imports what takes seconds once, and every process is forked from it.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch

import qk_sniffer.module
from loopback import client_of
from qk_sniffer.capture import Sniffer
from qk_sniffer.cli import main
from qk_sniffer.data.tokenizing import Encode
from qk_sniffer.hub import staging
from qk_sniffer.storage import data_root, file_facts, finalizing, head_parts, journal, parquet
from qk_sniffer.storage.commits import encode

push_module = importlib.import_module("qk_sniffer.hub.push")
"""The module, which its function hides."""

BEFORE, HALFWAY, AFTER = "before", "halfway", "after"

POINTS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "forward": (Sniffer, "capture", (BEFORE, AFTER)),
    "flush": (Sniffer, "flush_batch", (AFTER,)),
    "append": (journal._Segment, "write", (BEFORE, HALFWAY)),
    "sync": (os, "fsync", (BEFORE, AFTER)),
    "commit": (journal, "append_records", (BEFORE, HALFWAY, AFTER)),
    "finalizing": (finalizing, "append_records", (BEFORE, HALFWAY, AFTER)),
    "row group": (pq.ParquetWriter, "write_table", (BEFORE, AFTER)),
    "checksum": (file_facts, "checksum", (BEFORE,)),
    "text": (Path, "write_text", (HALFWAY,)),
    "rename": (Path, "replace", (BEFORE, AFTER)),
    "manifest": (finalizing, "write_manifest", (BEFORE, AFTER)),
    "journal's end": (Path, "rename", (BEFORE, AFTER)),
    "removal": (shutil, "rmtree", (HALFWAY,)),
    "moments": (journal, "write_state", (BEFORE, AFTER)),
    "clearing": (data_root, "_remove", (AFTER,)),
}
"""Fault points: the function that passes through each, and the moments of it at which one can die."""

LIMITS: dict[str, Any] = {
    "ROW_GROUP_BYTES": parquet,
    "MOST_BYTES": head_parts,
    "MOST_CHANGES": staging,
}
"""Constants that the environment of a process may lower."""

PRELOADED = ["qk_sniffer.predict", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Death:
    """Where a process kills itself: at a moment of one passage through a fault point, from 1.

    Another signal than SIGKILL may let it live on: SIGSTOP until it is told to go on. With ``error`` it
    is not killed, and that is raised there.
    """

    point: str
    moment: str
    passage: int
    signum: int = signal.SIGKILL
    error: Exception | None = None


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exitcode: Its exit status, or the negative number of the signal that ended it.
        passages: How often it passed each fault point; empty where it was killed.
        waited: Seconds of its life until the file appeared that ``Processes.run`` was given.
        seconds: Those that followed.
        printed: Its output.
    """

    exitcode: int | None
    passages: Counter[str]
    waited: float
    seconds: float
    printed: str


class Processes:
    """Starts processes.

    Args:
        directory: For what they print and count, and for their caches of datasets.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        with pytest.MonkeyPatch.context() as patch:
            # A server that has threads of its own could not be forked safely.
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TQDM_DISABLE"):
                patch.setenv(name, "1")
            forkserver.ensure_running()
        self._count = 0
        self._started: list[Any] = []
        # The time of the first run would count the imports of the server.
        self.run(["--help"], sync_seconds=0.0)

    def run(
        self,
        command: Sequence[str],
        *,
        sync_seconds: float,
        death: Death | None = None,
        after: float | None = None,
        since: Path | None = None,
        cache: str = "datasets",
    ) -> Ended:
        """Run the command line to its end.

        Args:
            command: Its arguments.
            sync_seconds: How often the journal commits.
            death: Where it kills itself.
            after: Seconds after which it is killed.
            since: The file whose appearance they count from; None counts from the start.
            cache: Name of the directory in which it keeps prepared datasets.
        """
        started = time.monotonic()
        process = self.start(command, sync_seconds=sync_seconds, death=death, cache=cache)
        while since is not None and not since.exists() and process.is_alive():
            time.sleep(0.0005)
        appeared = time.monotonic()
        if after is not None:
            process.join(after)
            process.kill()
        ended = process.wait(60)
        return replace(ended, waited=appeared - started, seconds=time.monotonic() - appeared)

    def start(
        self,
        command: Sequence[str],
        *,
        sync_seconds: float = 0.0,
        death: Death | None = None,
        cache: str = "datasets",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> "Started":
        """Start the command line.

        Args:
            command: Its arguments.
            sync_seconds: How often the journal commits.
            death: Where it kills itself.
            cache: Name of the directory in which it keeps prepared datasets.
            environment: Variables that it has besides this process's own.
        """
        self._count += 1
        report = self.directory / f"process-{self._count}"
        cache_path = self.directory / cache
        arguments = (list(command), sync_seconds, death, cache_path, dict(environment), report)
        process = self._context.Process(target=_process, args=arguments)
        process.start()
        self._started.append(process)
        return Started(process, report)

    def close(self) -> None:
        """Kill what a failed test has left, which may have stopped itself."""
        for process in self._started:
            process.kill()


@dataclass(frozen=True)
class Started:
    """A process that runs."""

    process: Any
    report: Path

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        path = self.report.with_suffix(".txt")
        return path.read_text() if path.exists() else ""

    def is_alive(self) -> bool:
        return bool(self.process.is_alive())

    def join(self, seconds: float) -> None:
        self.process.join(seconds)

    def kill(self) -> None:
        self.process.kill()

    def wait_until_stopped(self) -> None:
        """Wait until it has stopped itself by SIGSTOP."""
        status = Path(f"/proc/{self.process.pid}/stat")
        while self.process.is_alive() and status.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        assert self.process.is_alive(), self.printed

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def wait(self, seconds: float) -> Ended:
        """Let it end within some seconds."""
        self.process.join(seconds)
        hangs = self.process.is_alive()
        self.process.kill()
        self.process.join()
        assert not hangs, self.printed
        counted = self.report.with_suffix(".json")
        counts = Counter(json.loads(counted.read_text()) if counted.exists() else {})
        return Ended(self.process.exitcode, counts, 0.0, 0.0, self.printed)


def until(
    reached: Callable[[], bool], is_alive: Callable[[], bool], printed: Callable[[], str]
) -> None:
    """Wait for a process to be in a phase."""
    deadline = time.monotonic() + 120
    while not reached():
        assert is_alive(), printed()
        assert time.monotonic() < deadline, printed()
        time.sleep(0.01)


def _process(
    command: list[str],
    sync_seconds: float,
    death: Death | None,
    cache: Path,
    environment: dict[str, str],
    report: Path,
) -> None:
    os.environ.update(environment)
    os.chdir(os.environ.get("WORKING_DIRECTORY", "."))
    with report.with_suffix(".txt").open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    # A shell has the processes of its background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The workers of a data loader begin as they do under the command itself, not by a fork server.
    multiprocessing.set_start_method(None, force=True)
    with_hub = ExitStack()
    if endpoint := environment.get("HF_ENDPOINT"):
        # What this process has imported has read the environment already.
        token, home = environment["HF_TOKEN"], Path(environment["HF_HOME"])
        with_hub.enter_context(client_of(endpoint, token, home))
    datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(1)
    journal.SYNC_SECONDS = sync_seconds
    for name, module in LIMITS.items():
        setattr(module, name, int(environment.get(name, getattr(module, name))))
    passages = _Passages(death)
    for point, (owner, name, _) in POINTS.items():
        passages.watch(point, owner, name)
    passages.watch("tokenizing", Encode, "__call__")
    passages.watch("loading", qk_sniffer.module, "load_model")
    passages.watch("projection", torch.nn.Linear, "forward")
    passages.watch("pushing", push_module, "_push_branch")
    with with_hub:
        status = main(command)
    report.with_suffix(".json").write_text(json.dumps(passages.counts))
    sys.exit(status)


@dataclass
class _Passages:
    """Counts the passages of fault points, and dies at one of them."""

    death: Death | None
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, point: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            moment = self._moment(point, args)
            if moment == HALFWAY:
                _HALVES[point](original, *args, **kwargs)
            if moment in (BEFORE, HALFWAY):
                self._die()
            result = original(*args, **kwargs)
            if moment == AFTER:
                self._die()
            return result

        setattr(owner, name, watched)

    def _die(self) -> None:
        assert self.death is not None
        if self.death.error is not None:
            raise self.death.error
        os.kill(os.getpid(), self.death.signum)

    def _moment(self, point: str, args: tuple[Any, ...]) -> str | None:
        """The moment of this passage at which to die, None to live on."""
        # Other packages remove directories too, and a run looks for this one before it begins.
        if point == "removal" and not (Path(args[0]).name == ".journal-finished" and args[0].exists()):
            return None
        with self.lock:
            self.counts[point] += 1
            passage = self.counts[point]
        death = self.death
        return death.moment if death and (death.point, death.passage) == (point, passage) else None


def _half_a_write(write: Callable[..., None], segment: Any, data: Any) -> None:
    write(segment, data[: data.size // 2])


def _half_the_lines(_: Any, file: Any, records: Any) -> None:
    lines = encode(records)
    file.write(lines[: len(lines) // 2])
    file.flush()


def _half_a_text(write_text: Callable[..., int], path: Path, text: str, **options: Any) -> None:
    write_text(path, text[: len(text) // 2], **options)


def _half_a_directory(_: Any, path: Path) -> None:
    files = sorted(path.iterdir())
    for file in files[: len(files) // 2]:
        file.unlink()


_HALVES: dict[str, Callable[..., None]] = {
    "append": _half_a_write,
    "commit": _half_the_lines,
    "finalizing": _half_the_lines,
    "text": _half_a_text,
    "removal": _half_a_directory,
}

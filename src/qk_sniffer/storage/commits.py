"""The commit log of a journal: which bytes of its segments count.

``commits.jsonl`` has one line for each batch, an XXH3 digest of the line and the JSON behind it. A line
is written after the bytes that it names are synced, so a line that is whole names bytes that are there;
only a failing disk breaks that, and then the batch's own digest shows it.
"""

import json
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from filelock import FileLock, Timeout

from qk_sniffer.errors import UserError
from qk_sniffer.storage.files import replacing

log = logging.getLogger(__name__)

COMMITS_FILE, HEADER_FILE = "commits.jsonl", "header.json"
_LOCK_FILE = "lock"

LOCK_SECONDS = 10.0
"""How long to wait for a lock: the workers of a process that was killed keep it until they notice."""


@dataclass(frozen=True)
class Commit:
    """One batch.

    Attributes:
        segment: Number of the segment file that holds it.
        start: Its first byte there.
        stop: The byte after its last.
        index: Where its index of blocks begins.
        examples: Where its examples begin, as an Arrow IPC stream.
        digest: XXH3 of its bytes, 64 bits in hexadecimal.
        example_ids: (B,) int32.
    """

    segment: int
    start: int
    stop: int
    index: int
    examples: int
    digest: str
    example_ids: npt.NDArray[np.int32]


@dataclass
class CommitLog:
    """What a commit log says.

    Attributes:
        commits: The batches, in the order of their capture.
        finalizing: None until finalizing has begun; then whether every text had been read.
        n_broken: Lines that are torn or damaged, or name bytes that are not there.
    """

    commits: list[Commit] = field(default_factory=list)
    finalizing: bool | None = None
    n_broken: int = 0

    def example_ids(self) -> npt.NDArray[np.int32]:
        """The committed examples."""
        return np.concatenate([np.empty(0, np.int32), *(commit.example_ids for commit in self.commits)])

    def records(self) -> list[Commit | bool]:
        """What the log is to hold."""
        return [*self.commits, *([] if self.finalizing is None else [self.finalizing])]

    def warn(self, directory: Path, consequence: str) -> None:
        """Tell the user of lines that could not be trusted."""
        if self.n_broken:
            path = directory / COMMITS_FILE
            log.warning("%s: %d entries were torn or damaged; %s", path, self.n_broken, consequence)


def segment_path(directory: Path, number: int) -> Path:
    """The file of a segment."""
    return directory / f"segment-{number:05d}.arrow"


@contextmanager
def locked_journal(directory: Path) -> Iterator[None]:
    """Hold the lock of those who write a journal; a process that dies lets go of it.

    Raises:
        UserError: Another process holds it.
    """
    # Not bound to the thread: the writer's own thread gives it back.
    lock = FileLock(directory / _LOCK_FILE, thread_local=False)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise UserError(
            f"sniffer.output.data_root: {directory.parent} is being written by another process; wait "
            "for it, or name another directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def encode(records: Iterable[Commit | bool]) -> bytes:
    """Lines of the log: batches, and the beginning of finalizing with its ``finalizing``."""
    lines = []
    for record in records:
        content: dict[str, Any] = (
            {"finalizing": record}
            if isinstance(record, bool)
            else vars(record) | {"example_ids": record.example_ids.tolist()}
        )
        line = json.dumps(content, separators=(",", ":"))
        lines.append(f"{xxhash.xxh3_64_hexdigest(line.encode())} {line}\n")
    return "".join(lines).encode()


def append_records(file: Any, records: Sequence[Commit | bool]) -> None:
    """Append to the log, open without a buffer, so that it survives a loss of power."""
    size = os.fstat(file.fileno()).st_size
    try:
        lines = memoryview(encode(records))
        while lines:
            lines = lines[file.write(lines) :]
        os.fsync(file.fileno())
    except OSError:
        os.truncate(file.fileno(), size)
        raise


def read_commits(directory: Path) -> CommitLog:
    """What the log of a journal says; lines that can't be trusted are counted and left out."""
    log = CommitLog()
    path = directory / COMMITS_FILE
    sizes = {file.name: file.stat().st_size for file in directory.glob("segment-*.arrow")}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        digest, _, content = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(content).encode() != digest:
            log.n_broken += 1
            continue
        fields = json.loads(content)
        if "finalizing" in fields:
            log.finalizing = fields["finalizing"]
            continue
        fields["example_ids"] = np.array(fields["example_ids"], np.int32)
        commit = Commit(**fields)
        if sizes.get(segment_path(directory, commit.segment).name, 0) < commit.stop:
            log.n_broken += 1
            continue
        log.commits.append(commit)
    return log


def write_commits(directory: Path, records: Iterable[Commit | bool]) -> None:
    """Replace the log."""
    with replacing(directory / COMMITS_FILE) as temporary:
        temporary.write_bytes(encode(records))


def is_intact(directory: Path, commit: Commit) -> bool:
    """Whether the bytes of a batch are those that were written."""
    with (
        segment_path(directory, commit.segment).open("rb") as segment,
        mmap.mmap(segment.fileno(), 0, prot=mmap.PROT_READ) as content,
        memoryview(content) as view,
        view[commit.start : commit.stop] as batch,
    ):
        return xxhash.xxh3_64_hexdigest(batch) == commit.digest


def repair(directory: Path) -> CommitLog:
    """Drop what a death in the middle of writing left behind, and batches that a disk has damaged.

    Batches of the last segment, where a failing disk or a loss of power does its harm, are compared
    with their digests; finalizing compares all.

    Returns:
        The log as it is now. ``n_broken`` counts what was dropped.
    """
    log = read_commits(directory)
    last = max((commit.segment for commit in log.commits), default=-1)
    kept = [c for c in log.commits if c.segment != last or is_intact(directory, c)]
    log.n_broken += len(log.commits) - len(kept)
    log.commits = kept
    if log.n_broken:
        write_commits(directory, log.records())
    ends: dict[str, int] = {}
    for commit in kept:
        ends[segment_path(directory, commit.segment).name] = commit.stop
    for file in directory.glob("segment-*.arrow"):
        if file.name not in ends:
            file.unlink()
        elif file.stat().st_size > ends[file.name]:
            os.truncate(file, ends[file.name])
    return log

"""The commit logs of a journal: which bytes of its segments count.

Every process of a run writes a part of the journal, a directory with a log and segments of its own.
``commits.jsonl`` there has one line for each batch, an XXH3 digest of the line and the JSON behind it.
A line is written after the bytes that it names are synced, so a line that is whole names bytes that are
there; only a failing disk breaks that, and then the batch's own digest shows it.

Of processes that share a model each has a batch's line. The batch counts where all of them have it: one
that died may have fewer than the others.
"""

import json
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from filelock import FileLock, Timeout

from qk_sniffer.errors import UserError
from qk_sniffer.storage.checked import header_fault, is_commit
from qk_sniffer.storage.files import damaged, read_json, replacing
from qk_sniffer.storage.shards import companions, part_directories

log = logging.getLogger(__name__)

COMMITS_FILE, HEADER_FILE = "commits.jsonl", "header.json"
_LOCK_FILE = "lock"

LOCK_SECONDS = 10.0
"""How long to wait for a lock: the workers of a process that was killed keep it until they notice."""


@dataclass(frozen=True)
class Commit:
    """One batch.

    Attributes:
        segment: The segment file that holds it.
        start: Its first byte there.
        stop: The byte after its last.
        index: Where its index of blocks begins.
        examples: Where its examples begin, as an Arrow IPC stream.
        digest: XXH3 of its bytes, 64 bits in hexadecimal.
        example_ids: (B,) int32.
    """

    segment: Path
    start: int
    stop: int
    index: int
    examples: int
    digest: str
    example_ids: npt.NDArray[np.int32]


@dataclass
class CommitLog:
    """What the commit logs of some parts say.

    Attributes:
        commits: The batches of each part in the order of their capture.
        finalizing: None until finalizing has begun; then whether every text had been read.
        n_broken: Lines that are torn or damaged, or name bytes that are not there.
    """

    commits: list[Commit] = field(default_factory=list)
    finalizing: bool | None = None
    n_broken: int = 0

    def example_ids(self) -> npt.NDArray[np.int32]:
        """The committed examples, ascending."""
        ids = (commit.example_ids for commit in self.commits)
        return np.unique(np.concatenate([np.empty(0, np.int32), *ids]))

    def records(self) -> list[Commit | bool]:
        """What a log is to hold."""
        return [*self.commits, *([] if self.finalizing is None else [self.finalizing])]


def read_header(journal: Path) -> dict[str, Any]:
    """What a journal's header says is captured.

    Raises:
        UserError: It is damaged.
    """
    path = journal / HEADER_FILE
    header: dict[str, Any] = read_json(path)
    if fault := header_fault(header):
        raise damaged(path, f"it is no header of a journal ({fault})")
    return header


@contextmanager
def locked_journal(journal: Path) -> Iterator[None]:
    """Hold the locks of all parts of a journal.

    Raises:
        UserError: Another process holds one of them.
    """
    with ExitStack() as locks:
        for part in part_directories(journal):
            locks.enter_context(locked_part(part))
        yield


@contextmanager
def locked_part(directory: Path) -> Iterator[None]:
    """Hold the lock of who writes a part of a journal; a process that dies lets go of it.

    Raises:
        UserError: Another process holds it.
    """
    # Not bound to the thread: the writer's own thread gives it back.
    lock = FileLock(directory / _LOCK_FILE, thread_local=False)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise UserError(
            f"sniffer.output.data_root: {directory.parent.parent} is being written by another process; "
            "wait for it, or name another directory"
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
            else vars(record)
            | {"segment": record.segment.name, "example_ids": record.example_ids.tolist()}
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


def read_journal(journal: Path) -> CommitLog:
    """What the logs of all parts of a journal say, with the batches that count."""
    logs = {part: read_commits(part) for part in part_directories(journal)}
    counted = _counted(logs)
    joined = CommitLog()
    for part, found in logs.items():
        joined.commits += counted[part]
        joined.n_broken += found.n_broken
        if found.finalizing is not None:
            joined.finalizing = found.finalizing
    return joined


def _counted(logs: Mapping[Path, CommitLog]) -> dict[Path, list[Commit]]:
    """The batches of each part that all processes which share its model have, by their texts."""
    batches = {part: {_key(commit): commit for commit in log.commits} for part, log in logs.items()}
    counted = {}
    for part, log in logs.items():
        others = [batches.get(other, {}) for other in companions(part) if other != part]
        # A batch that one of them has twice was captured anew, and the last is that of all.
        counted[part] = [
            commit
            for commit in log.commits
            if not others
            or (
                batches[part][_key(commit)] is commit and all(_key(commit) in other for other in others)
            )
        ]
    return counted


def _key(commit: Commit) -> bytes:
    """What the batch of one process and that of another have in common."""
    return commit.example_ids.tobytes()


def read_commits(directory: Path) -> CommitLog:
    """What the log of a part says; lines that can't be trusted are counted and left out."""
    log = CommitLog()
    path = directory / COMMITS_FILE
    sizes = {file: file.stat().st_size for file in directory.glob("segment-*.arrow")}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        digest, _, content = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(content).encode() != digest:
            log.n_broken += 1
            continue
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            fields = None
        if not is_commit(fields):
            log.n_broken += 1
            continue
        if "finalizing" in fields:
            log.finalizing = fields["finalizing"]
            continue
        fields["segment"] = directory / fields["segment"]
        fields["example_ids"] = np.array(fields["example_ids"], np.int32)
        commit = Commit(**fields)
        if sizes.get(commit.segment, 0) < commit.stop:
            log.n_broken += 1
            continue
        log.commits.append(commit)
    return log


def write_commits(directory: Path, records: Iterable[Commit | bool]) -> None:
    """Replace the log of a part."""
    with replacing(directory / COMMITS_FILE) as temporary:
        temporary.write_bytes(encode(records))


def drop_broken(directory: Path, found: CommitLog, consequence: str) -> None:
    """Write the log of a part without what could not be trusted, and tell the user what comes of it."""
    if found.n_broken:
        write_commits(directory, found.records())
        path = directory / COMMITS_FILE
        log.warning("%s: %d entries were torn or damaged; %s", path, found.n_broken, consequence)


def is_intact(commit: Commit) -> bool:
    """Whether the bytes of a batch are those that were written."""
    with (
        commit.segment.open("rb") as segment,
        mmap.mmap(segment.fileno(), 0, prot=mmap.PROT_READ) as content,
        memoryview(content) as view,
        view[commit.start : commit.stop] as batch,
    ):
        return xxhash.xxh3_64_hexdigest(batch) == commit.digest


def repair(directory: Path, consequence: str) -> CommitLog:
    """Drop what a death in the middle of writing left behind, and batches that a disk has damaged.

    Batches of the last segment, where a failing disk or a loss of power does its harm, are compared
    with their digests; finalizing compares all.

    Args:
        directory: A part of a journal.
        consequence: What becomes of the dropped batches, for the warning.

    Returns:
        Its log as it is now. ``n_broken`` counts what was dropped.
    """
    found = read_commits(directory)
    last = max((commit.segment for commit in found.commits), default=None)
    kept = [c for c in found.commits if c.segment != last or is_intact(c)]
    found.n_broken += len(found.commits) - len(kept)
    found.commits = kept
    drop_broken(directory, found, consequence)
    _cut_segments(directory, kept)
    return found


def repair_journal(journal: Path, consequence: str) -> None:
    """Repair all parts of a journal.

    Batches that not all processes which share a model have go too, and nobody is told: a death leaves
    them behind as it does those that are not committed.

    Args:
        journal: The journal.
        consequence: As in ``repair``.
    """
    logs = {part: repair(part, consequence) for part in part_directories(journal)}
    for part, counted in _counted(logs).items():
        if len(counted) < len(logs[part].commits):
            logs[part].commits = counted
            write_commits(part, logs[part].records())
            _cut_segments(part, counted)


def _cut_segments(directory: Path, commits: Sequence[Commit]) -> None:
    """Cut the segments of a part behind its last batches."""
    ends = {commit.segment: commit.stop for commit in commits}
    for file in directory.glob("segment-*.arrow"):
        if file not in ends:
            file.unlink()
        elif file.stat().st_size > ends[file]:
            os.truncate(file, ends[file])

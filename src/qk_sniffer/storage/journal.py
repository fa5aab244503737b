"""The journal: where rows go as they are captured, so that memory does not grow with the data.

Every process of a run appends to segment files of its own. A segment file is a sequence of batches,
each one of the model's or several small ones together: the vectors in the model's dtype, then the
numbers of their rows, the examples as an Arrow IPC stream, and the index of blocks. ``commits.jsonl``
says which bytes count, ``header.json`` what is captured. One thread does all writing, so that a forward
waits only where the disk is slower than the model.
"""

import json
import logging
import os
import queue
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from qk_sniffer.kinds import Part
from qk_sniffer.moments import MomentState
from qk_sniffer.storage.commits import (
    COMMITS_FILE,
    HEADER_FILE,
    Commit,
    append_records,
    locked_part,
    repair,
)
from qk_sniffer.storage.direct import PAGE, DirectFile
from qk_sniffer.storage.files import explained_writing, sync_directory, write_text
from qk_sniffer.storage.moment_states import next_state_files, state_files, write_state
from qk_sniffer.storage.schema import examples_schema
from qk_sniffer.storage.shards import Shard, note_heads, part_directory

log = logging.getLogger(__name__)

SYNC_SECONDS = 5.0
"""How often finished batches are synced and committed: the work that a death can cost, against the
waiting of the disk."""

WRITES_PER_SYNC = 5
"""How often they are written meanwhile. Small batches are written together, since each write takes time
from the forward."""

MOST_TASKS = 16
"""Steps of writing that may wait for the disk before the forward waits too. Vectors wait in memory of
fixed size, so that these are small."""

SEGMENT_BYTES = 8 * 2**30
"""Size from which the next batch begins a new segment file."""

ALIGNMENT = 64
"""What follows the vectors of a batch begins at a multiple of this many bytes, and so do the vectors of
a block, but for those that lie right behind others of their width. A batch begins with a page."""

DTYPES = ("float32", "float16", "bfloat16")
INDEX = np.dtype(
    [("rows", "<i8"), ("vectors", "<i8"), ("n_rows", "<i4"), ("window", "<i4"), ("dtype", "<i4")]
)
"""A block in the index of its batch: where its numbers and its vectors begin in the segment, how many
rows it has (0 for none), the layer's window (-1 for none) and the number of its dtype in ``DTYPES``. An
index has a block for each layer and kind, then second ones, and so on for as many as one of them has,
in the order of their tokens."""

_TOKENS = pa.field("tokens", pa.list_(pa.string()))
_CONTINUE = (
    "make room or mend the disk, then run the same command again, which goes on after the last batch "
    "that was saved"
)


class Portion(Protocol):
    """Consecutive bytes of the vectors of a batch, in memory that others wait for."""

    @property
    def start(self) -> int:
        """The number of the first among the bytes of the batch."""

    def wait(self) -> npt.NDArray[np.uint8]:
        """The bytes; they may be on their way from a device."""

    def release(self) -> None:
        """Give the memory back."""


class Block(Protocol):
    """Kept rows of one layer and kind from one batch."""

    @property
    def layer_idx(self) -> int:
        """Layer in the text decoder."""

    @property
    def kind(self) -> Part:
        """Queries, keys, values, outputs, or the statistics of each query."""

    @property
    def sliding_window(self) -> int | None:
        """The layer's window; None for full attention."""

    @property
    def dtype(self) -> str:
        """Number format of the vectors: float32, float16 or bfloat16."""

    @property
    def n_rows(self) -> int:
        """K."""

    @property
    def vectors(self) -> int:
        """The byte of the batch where (n_heads, K, head_dim) begin.

        It is a multiple of ``ALIGNMENT``, or right behind others of their width.
        """

    @property
    def rows(self) -> int:
        """Where (3, K) begin among the batch's numbers: example_id, position and bucket of each row.

        The rows of an example are adjacent and ascend in position; at their end may be some whose
        position is -1, which don't count.
        """


@dataclass(frozen=True)
class Example:
    """One text: its row in the examples table, and its tokens where they are captured."""

    example_id: int
    source_id: str
    n_tokens: int
    truncated: bool
    tokens: list[str] | None = None
    n_prompt_tokens: int | None = None
    messages: list[dict[str, Any]] | None = None
    generated_ids: list[int] | None = None
    generated_text: str | None = None


class _Segment:
    """An append-only file, with a digest of each batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = DirectFile(path)
        self.size = 0
        self._digest = xxhash.xxh3_64()

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        """Append bytes: (N,) uint8."""
        self._file.write(data)
        self._digest.update(data.data)
        self.size += data.size

    def end_batch(self) -> str:
        """End a batch, at the end of a page, and give the digest of its bytes."""
        self._file.flush()
        digest = self._digest.hexdigest()
        self._digest = xxhash.xxh3_64()
        return digest

    def sync(self) -> None:
        self._file.sync()

    def close(self, size: int = -1) -> None:
        """Close the file, cut to ``size``; an empty one goes."""
        self._file.close()
        if size >= 0:
            os.truncate(self.path, size)
        if size == 0:
            self.path.unlink()


def _aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return size + -size % alignment


class JournalWriter:
    """Appends blocks and commits batches, in a thread of its own.

    Each process of a run writes a part of its own, which is repaired and continued if it is there
    already. What one of the methods can't write is raised by a later one, at the latest by ``close``.

    Args:
        journal: The journal; made if it is missing.
        header: What is captured, kept by the first process for whoever reads the journal.
        rank: Number of this process among those of the run.
        shard: What it writes where it shares the model with others, which hand it the same texts, and
            commit them together at the same batches; None where it writes all heads.

    Raises:
        UserError: Another process writes this part, it has other heads, or the disk refuses.
    """

    def __init__(
        self, journal: Path, header: dict[str, Any], rank: int = 0, shard: Shard | None = None
    ) -> None:
        self.journal = journal
        self.directory = directory = part_directory(journal, rank, 1 if shard is None else shard.count)
        self._keeps_texts = shard is None or shard.number == 0
        self._streams = {
            (stream["layer_idx"], stream["kind"]): i for i, stream in enumerate(header["streams"])
        }
        self._texts = examples_schema(header["settings"]).append(_TOKENS)
        with ExitStack() as undo, explained_writing(directory, _CONTINUE):
            directory.mkdir(parents=True, exist_ok=True)
            undo.enter_context(locked_part(directory))
            earlier = repair(directory, "what they stood for is captured again")
            self._moment_files = cycle(next_state_files(directory))
            if shard is not None:
                note_heads(directory, shard.heads, header["streams"], is_new=not earlier.commits)
            if rank == 0:
                write_text(journal / HEADER_FILE, json.dumps(header))
            numbers = [int(c.segment.stem.rpartition("-")[2]) for c in earlier.commits]
            self._number = max(numbers, default=-1) + 1
            self._log = (directory / COMMITS_FILE).open("ab", buffering=0)
            self._begin_segment()
            self._release = undo.pop_all().close
        self._unsynced: list[Commit] = []
        self._last_sync = self._last_write = time.monotonic()
        # One process watches the disk for all.
        self._watches_space = rank == 0
        self._error: Exception | None = None
        self._vectors = 0
        self._waiting_moments: deque[tuple[int, MomentState]] = deque(maxlen=1)
        self._n_moments_given = self._n_moments_saved = 0
        self.bytes_written = 0
        """Of the batches that this writer has committed."""
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_TASKS)
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def append(self, portion: Portion) -> None:
        """Write some of a batch's vectors, in their order; they count once the batch is committed."""
        self._raise_error()
        self._queue.put(partial(self._write_portion, portion))

    @property
    def sync_seconds(self) -> float:
        """How often what was captured is made safe."""
        return SYNC_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it is time to write and commit the batches that have ended."""
        return time.monotonic() - self._last_write >= SYNC_SECONDS / WRITES_PER_SYNC

    def commit(
        self, blocks: Sequence[Block], numbers: npt.NDArray[np.int32], examples: Sequence[Example]
    ) -> None:
        """Make the vectors since the last commit and their examples part of the capture.

        Args:
            blocks: What the vectors are; those of a layer and kind in the order of their tokens.
            numbers: Of all rows.
            examples: The texts. Of processes that share a model the first alone writes more of them
                than their ids.
        """
        self._raise_error()
        self._last_write = time.monotonic()
        # Made here, since a thread that wants the interpreter takes it from the forward's.
        content = pa.BufferOutputStream()
        with pa.ipc.new_stream(content, self._texts) as stream:
            texts = [vars(example) for example in examples] if self._keeps_texts else []
            stream.write_table(pa.Table.from_pylist(texts, self._texts))
        ids = np.array([example.example_id for example in examples], np.int32)
        task = partial(self._end_batch, self._index(blocks), numbers, content.getvalue(), ids)
        self._queue.put(partial(self._attempt, task))

    def save_moments(self, state: MomentState) -> None:
        """Write the moments of all texts counted since this writer was opened, for those saved before.

        Their arrays may not change any more. Processes that share a model do so at the same batches,
        and only where ``moments_are_saved`` in all of them, so that all always have some in common.
        """
        self._raise_error()
        self._n_moments_given += 1
        # One that waits for the disk still is not needed any more.
        self._waiting_moments.append((self._n_moments_given, state))
        self._queue.put(partial(self._attempt, self._write_moments))

    @property
    def moments_are_saved(self) -> bool:
        """Whether the moments that ``save_moments`` was last given are on disk.

        Raises:
            UserError: The disk has refused something.
        """
        self._raise_error()
        return self._n_moments_saved == self._n_moments_given

    def wait_for_moments(self) -> None:
        """Wait until they are.

        Raises:
            UserError: The disk has refused something.
        """
        while not self.moments_are_saved:
            time.sleep(0.01)

    def close(self) -> None:
        """Write and commit what is waiting, and close the files.

        Raises:
            UserError: The disk refused something; what was committed stays readable.
        """
        self._queue.put(None)
        self._thread.join()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """Run tasks until the writer is closed; after an error, only make room."""
        while True:
            try:
                wait = self._last_sync + SYNC_SECONDS - time.monotonic() if self._unsynced else None
                task = self._queue.get(timeout=wait if wait is None else max(0.0, wait))
            except queue.Empty:
                self._attempt(self._sync)
                continue
            if task is None:
                break
            task()
            del task
        self._attempt(self._sync, after_error=True)
        self._attempt(lambda: self._segment.close(self._committed_size), after_error=True)
        self._log.close()
        self._release()

    def _attempt(self, task: Callable[[], None], *, after_error: bool = False) -> None:
        if self._error is not None and not after_error:
            return
        try:
            with explained_writing(self._segment.path, _CONTINUE):
                task()
        except Exception as error:
            self._error = self._error or error

    def _begin_segment(self) -> None:
        self._segment = _Segment(self.directory / f"segment-{self._number:05d}.arrow")
        sync_directory(self.directory)
        self._number += 1
        self._batch_start = self._committed_size = 0

    def _write_portion(self, portion: Portion) -> None:
        self._attempt(partial(self._write_vectors, portion))
        portion.release()

    def _write_vectors(self, portion: Portion) -> None:
        vectors = portion.wait()
        if portion.start == 0:
            # Behind a batch that was given up, whose bytes are of no use.
            if padding := -self._segment.size % PAGE:
                self._segment.write(np.zeros(padding, np.uint8))
            self._vectors = self._segment.size
        self._segment.write(vectors)

    def _end_batch(
        self,
        index: npt.NDArray[Any],
        numbers: npt.NDArray[np.int32],
        examples: pa.Buffer,
        example_ids: npt.NDArray[np.int32],
    ) -> None:
        segment = self._segment
        rows = _aligned(segment.size)
        texts = rows + _aligned(numbers.nbytes)
        # The next batch begins where this one ends.
        stop = _aligned(texts + examples.size + index.nbytes, PAGE)
        place = stop - index.nbytes
        is_there = index["n_rows"] > 0
        index["rows"] += rows * is_there
        index["vectors"] += self._vectors * is_there
        tail = np.zeros(stop - segment.size, np.uint8)
        for start, part in ((rows, numbers.view(np.uint8)), (texts, examples), (place, index)):
            values = np.frombuffer(part, np.uint8)
            tail[start - segment.size :][: values.size] = values
        segment.write(tail)
        digest = segment.end_batch()
        self._unsynced.append(
            Commit(segment.path, self._batch_start, stop, place, texts, digest, example_ids)
        )
        self.bytes_written += stop - self._batch_start
        self._batch_start = stop
        if stop >= SEGMENT_BYTES:
            self._sync()
            segment.close()
            self._begin_segment()
        elif time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self._sync()

    def _write_moments(self) -> None:
        if self._waiting_moments:
            number, state = self._waiting_moments.pop()
            path = next(self._moment_files)
            with explained_writing(path, _CONTINUE):
                write_state(path, state)
            self._n_moments_saved = number

    def _index(self, blocks: Sequence[Block]) -> npt.NDArray[Any]:
        """The index of a batch's blocks, with places that count from its first vector and number."""
        level = Counter[int]()
        entries = []
        for block in blocks:
            stream = self._streams[block.layer_idx, block.kind]
            window = -1 if block.sliding_window is None else block.sliding_window
            entry = 4 * block.rows, block.vectors, block.n_rows, window, DTYPES.index(block.dtype)
            entries.append((level[stream], stream, entry))
            level[stream] += 1
        index = np.zeros((max(level.values(), default=1), len(self._streams)), INDEX)
        for number, stream, entry in entries:
            index[number, stream] = entry
        return index

    def _sync(self) -> None:
        """Make the finished batches safe from a loss of power, and commit them."""
        # What can't be synced is given up: a second sync would succeed without its bytes.
        batches, self._unsynced = self._unsynced, []
        if batches:
            self._segment.sync()
            append_records(self._log, batches)
            self._committed_size = batches[-1].stop
            if self._watches_space:
                self._watch_space()
        self._last_sync = time.monotonic()

    def _watch_space(self) -> None:
        free = shutil.disk_usage(self.directory).free
        files = [*self.journal.glob("*/segment-*.arrow"), *state_files(self.journal)]
        written = sum(file.stat().st_size for file in files)
        if free < written:
            self._watches_space = False
            log.warning(
                "%s: %.1f GB are free, less than the Parquet files of what is captured so far may take "
                "(%.1f GB); make room before the run ends",
                self.journal.parent,
                free / 1e9,
                written / 1e9,
            )

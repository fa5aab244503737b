"""The journal: where a batch's rows go when it is flushed, so that memory does not grow with the data.

Every process of a run appends to segment files of its own. A segment file is a sequence of Arrow IPC
messages: for every layer and kind of a batch one tensor of
row numbers and one of vectors in the model's dtype, then one stream with the batch's examples, and then
the batch's index of blocks. ``commits.jsonl`` says which bytes count, ``header.json`` what is captured.
One thread does all writing, so that a forward waits only where the disk is slower than the model.
"""

import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from qk_sniffer.storage.commits import (
    COMMITS_FILE,
    HEADER_FILE,
    Commit,
    append_records,
    locked_part,
    part_directory,
    repair,
)
from qk_sniffer.storage.files import explained_writing, sync_directory, write_text
from qk_sniffer.storage.schema import EXAMPLES_SCHEMA, Kind

log = logging.getLogger(__name__)

SYNC_SECONDS = 5.0
"""How often finished batches are synced and committed: the work that a death can cost, against the
waiting of the disk."""

QUEUE_BYTES = 64 * 2**20
"""Vectors that may wait for the disk before the forward waits too."""

SEGMENT_BYTES = 8 * 2**30
"""Size from which the next batch begins a new segment file."""

ALIGNMENT = 64
"""Every message begins at a multiple of this many bytes."""

DTYPES = ("float32", "float16", "bfloat16")
INDEX = np.dtype(
    [("rows", "<i8"), ("vectors", "<i8"), ("n_rows", "<i4"), ("window", "<i4"), ("dtype", "<i4")]
)
"""A block in the index of its batch: where the bodies of its tensors begin, its number of rows (0 for
none), the layer's window (-1 for none) and the number of its dtype in ``DTYPES``."""

TOKENS_SCHEMA = EXAMPLES_SCHEMA.append(pa.field("tokens", pa.list_(pa.string())))
_CONTINUE = (
    "make room or mend the disk, then run the same command again, which goes on after the last batch "
    "that was saved"
)


@dataclass(frozen=True)
class Block:
    """The kept rows of one layer and kind from one batch.

    Attributes:
        layer_idx: Layer in the text decoder.
        kind: "q" or "k".
        sliding_window: The layer's window; None for full attention.
        dtype: Number format of the vectors: float32, float16 or bfloat16.
        vectors: (n_heads, K, head_dim); bfloat16 as the uint16 of its bits.
        rows: (3, K) int32: example_id, position and bucket. The rows of an example are adjacent and
            ascend in position.
    """

    layer_idx: int
    kind: Kind
    sliding_window: int | None
    dtype: str
    vectors: npt.NDArray[Any]
    rows: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One text: its row in the examples table, and its tokens where they are captured."""

    example_id: int
    source_id: str
    n_tokens: int
    truncated: bool
    tokens: list[str] | None = None


class _Segment:
    """An append-only file, in the shape that Arrow writes to, with a digest of each batch."""

    closed = False

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered, so that a write that fails takes no earlier batch with it.
        self._file = path.open("xb", buffering=0)
        self.size = 0
        self._digest = xxhash.xxh3_64()
        self.sink = pa.PythonFile(self, mode="w")

    def write(self, data: bytes) -> int:
        written = 0
        while written < len(data):
            written += self._file.write(memoryview(data)[written:])
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing waits here; Arrow asks all the same."""

    def align(self) -> int:
        """Fill up to the next message, and give its place."""
        self.write(bytes(-self.size % ALIGNMENT))
        return self.size

    def write_tensor(self, array: npt.NDArray[Any]) -> int:
        """Append a tensor, and give the place of its values."""
        self.align()
        pa.ipc.write_tensor(pa.Tensor.from_numpy(array), self.sink)
        return self.size - array.nbytes

    def end_batch(self) -> str:
        """The digest of the bytes since the last batch."""
        digest = self._digest.hexdigest()
        self._digest = xxhash.xxh3_64()
        return digest

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self, size: int = -1) -> None:
        """Close the file, cut to ``size``; an empty one goes."""
        self._file.close()
        if size >= 0:
            os.truncate(self.path, size)
        if size == 0:
            self.path.unlink()


class JournalWriter:
    """Appends blocks and commits batches, in a thread of its own.

    Each process of a run writes a part of its own, which is repaired and continued if it is there
    already. What one of the methods can't write is raised by a later one, at the latest by ``close``.

    Args:
        journal: The journal; made if it is missing.
        header: What is captured, kept by the first process for whoever reads the journal.
        rank: Number of this process among those of the run.

    Raises:
        UserError: Another process writes this part, or the disk refuses.
    """

    def __init__(self, journal: Path, header: dict[str, Any], rank: int = 0) -> None:
        self.journal = journal
        self.directory = directory = part_directory(journal, rank)
        self._streams = {
            (stream["layer_idx"], stream["kind"]): i for i, stream in enumerate(header["streams"])
        }
        with ExitStack() as undo, explained_writing(directory, _CONTINUE):
            directory.mkdir(parents=True, exist_ok=True)
            undo.enter_context(locked_part(directory))
            earlier = repair(directory, "what they stood for is captured again")
            if rank == 0:
                write_text(journal / HEADER_FILE, json.dumps(header))
            numbers = [int(c.segment.stem.rpartition("-")[2]) for c in earlier.commits]
            self._number = max(numbers, default=-1) + 1
            self._log = (directory / COMMITS_FILE).open("ab", buffering=0)
            self._begin_segment()
            self._release = undo.pop_all().close
        self._unsynced: list[Commit] = []
        self._last_sync = time.monotonic()
        # One process watches the disk for all.
        self._watches_space = rank == 0
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[Callable[[], None], int] | None] = queue.Queue()
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def append(self, load: Callable[[], Block], n_bytes: int) -> None:
        """Write one block; it counts once its batch is committed.

        Args:
            load: Gives the block, in the writer's thread; it may wait for a copy from a device.
            n_bytes: Size of the block, for the limit on what waits in memory.
        """
        self._put(lambda: self._write_block(load()), n_bytes)

    def commit(self, examples: Sequence[Example]) -> None:
        """Make the blocks since the last commit and these examples part of the capture."""
        self._put(lambda: self._end_batch(examples), 2**12 * len(examples))

    def close(self) -> None:
        """Write and commit what is waiting, and close the files.

        Raises:
            UserError: The disk refused something; what was committed stays readable.
        """
        self._queue.put(None)
        self._thread.join()
        self._raise_error()

    def _put(self, task: Callable[[], None], n_bytes: int) -> None:
        with self._room:
            self._room.wait_for(
                lambda: self._queued_bytes == 0 or self._queued_bytes + n_bytes <= QUEUE_BYTES
            )
            self._queued_bytes += n_bytes
        self._raise_error()
        self._queue.put((task, n_bytes))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """Run tasks until the writer is closed; after an error, only make room."""
        while True:
            try:
                wait = self._last_sync + SYNC_SECONDS - time.monotonic() if self._unsynced else None
                item = self._queue.get(timeout=wait if wait is None else max(0.0, wait))
            except queue.Empty:
                self._attempt(self._sync)
                continue
            if item is None:
                break
            task, n_bytes = item
            self._attempt(task)
            del task, item
            with self._room:
                self._queued_bytes -= n_bytes
                self._room.notify()
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
        self._index = np.zeros(len(self._streams), INDEX)

    def _write_block(self, block: Block) -> None:
        entry = self._index[self._streams[block.layer_idx, block.kind]]
        if entry["n_rows"]:
            raise RuntimeError(f"layer {block.layer_idx}, {block.kind}: two blocks in one batch")
        entry["rows"] = self._segment.write_tensor(block.rows)
        entry["vectors"] = self._segment.write_tensor(block.vectors)
        entry["n_rows"] = block.rows.shape[1]
        entry["window"] = -1 if block.sliding_window is None else block.sliding_window
        entry["dtype"] = DTYPES.index(block.dtype)

    def _end_batch(self, examples: Sequence[Example]) -> None:
        segment = self._segment
        place = segment.align()
        with pa.ipc.new_stream(segment.sink, TOKENS_SCHEMA) as stream:
            stream.write_table(pa.Table.from_pylist([vars(e) for e in examples], TOKENS_SCHEMA))
        index = segment.align()
        segment.write(self._index.tobytes())
        self._index = np.zeros_like(self._index)
        ids = np.array([example.example_id for example in examples], np.int32)
        self._unsynced.append(
            Commit(
                segment.path,
                self._batch_start,
                segment.size,
                index,
                place,
                segment.end_batch(),
                ids,
            )
        )
        self._batch_start = segment.size
        if segment.size >= SEGMENT_BYTES:
            self._sync()
            segment.close()
            self._begin_segment()
        elif time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self._sync()

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
        written = sum(file.stat().st_size for file in self.journal.glob("*/segment-*.arrow"))
        if free < written:
            self._watches_space = False
            log.warning(
                "%s: %.1f GB are free, less than the Parquet files of what is captured so far may take "
                "(%.1f GB); make room before the run ends",
                self.journal.parent,
                free / 1e9,
                written / 1e9,
            )

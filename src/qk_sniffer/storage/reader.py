"""Reads a journal: by memory map, one row of vectors as one element, so that numpy moves whole rows."""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.storage.commits import Commit, read_header, read_journal
from qk_sniffer.storage.journal import ALIGNMENT, DTYPES, INDEX
from qk_sniffer.storage.shards import has_texts, heads_of_parts

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_INT32 = np.dtype(np.int32)
_BATCHES_AT_HAND = 64
_LONG_STRETCH = 256
"""Rows from which stretches are worth a piece of their own."""

Runs = npt.NDArray[np.int64]
"""(R, 4) int64: example id, number of the block, first row and row after the last of each run."""


class JournalReader:
    """Reads what was committed to a journal.

    Args:
        directory: The journal; nobody may write it meanwhile.

    Raises:
        UserError: The header is damaged, or what says which heads a part holds.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.header = read_header(directory)
        self.log = read_journal(directory)
        self._by_part: dict[Path, list[Commit]] = {}
        for commit in self.log.commits:
            self._by_part.setdefault(commit.segment.parent, []).append(commit)
        self._heads = heads_of_parts(self._by_part, self.header["streams"])
        self._with_texts = [c for part in filter(has_texts, self._by_part) for c in self._by_part[part]]
        self._read_tokens = lru_cache(_BATCHES_AT_HAND)(self._tokens_of_batch)
        self._batch_of_example: dict[int, int] | None = None

    def examples(self) -> Iterator[pa.Table]:
        """The examples of each batch, with their tokens in the column ``tokens``."""
        for commit in self._with_texts:
            yield self._examples_of(commit)

    def tokens(self, example_id: int) -> pa.Array:
        """The token strings of an example."""
        if self._batch_of_example is None:
            self._batch_of_example = {
                example: number
                for number, commit in enumerate(self._with_texts)
                for example in commit.example_ids.tolist()
            }
        return self._read_tokens(self._batch_of_example[example_id])[example_id]

    def together(self, number: int) -> list[list[int]]:
        """The heads of a layer and kind, those together that lie in the same parts.

        Args:
            number: That of the layer and kind among the header's streams.

        Returns:
            Their numbers among the captured heads of the stream.
        """
        groups: dict[tuple[Path, ...], list[int]] = {}
        for index, head in enumerate(self.header["streams"][number]["heads"]):
            parts = tuple(part for part, heads in self._heads.items() if head in heads[number])
            groups.setdefault(parts, []).append(index)
        return list(groups.values())

    def stream(self, number: int, head: int = 0) -> "StreamReader":
        """The rows of one layer and kind.

        Args:
            number: That of the layer and kind among the header's streams.
            head: One of the heads that are read, which lie in the same parts; its number among the
                stream's captured heads.
        """
        wanted = self.header["streams"][number]["heads"][head]
        held = {part: heads[number] for part, heads in self._heads.items()}
        parts = (part for part in self._by_part if wanted in held[part])
        return StreamReader(self, number, [c for part in parts for c in self._by_part[part]], held)

    def _tokens_of_batch(self, number: int) -> dict[int, pa.Array]:
        table = self._examples_of(self._with_texts[number])
        ids = table["example_id"].to_pylist()
        return {i: row.values for i, row in zip(ids, table["tokens"], strict=True)}

    def _examples_of(self, commit: Commit) -> pa.Table:
        with commit.segment.open("rb") as segment:
            segment.seek(commit.examples)
            with pa.ipc.open_stream(segment.read(commit.index - commit.examples)) as stream:
                return stream.read_all()


class _Stretch(NamedTuple):
    """Rows that lie behind each other.

    Attributes:
        segment: The number of their segment.
        vectors: The byte where the vectors of their block begin.
        n_rows: Rows of the block.
        first: The number of the first there.
        length: How many they are.
    """

    segment: int
    vectors: int
    n_rows: int
    first: int
    length: int


class Places(NamedTuple):
    """Where some rows lie, found once for all heads of a layer and kind.

    Attributes:
        table: (K,) the entries of their blocks in the index.
        segments: (K,) the numbers of their segments.
        rows: (K,) their numbers in the blocks.
        breaks: The first row of each piece but the first.
        stretches: Where they are few; none crosses a break.
    """

    table: npt.NDArray[Any]
    segments: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    breaks: list[int]
    stretches: list[_Stretch] | None


class StreamReader:
    """The rows of heads of one layer and kind: a context manager that holds memory maps of segments.

    Every reader maps the segments for itself, so that it can give their pages back as it goes, and
    threads don't disturb each other.

    Args:
        journal: The journal.
        number: That of the layer and kind among the header's streams.
        commits: The batches that are read; all of them have the heads.
        held: The heads of the layer and kind that each part has, in order.
    """

    def __init__(
        self,
        journal: JournalReader,
        number: int,
        commits: Sequence[Commit],
        held: Mapping[Path, tuple[int, ...]],
    ) -> None:
        stream = journal.header["streams"][number]
        self.head_dim = stream["head_dim"]
        self._heads, self._commits, self._held = stream["heads"], commits, held
        self._number, self._n_streams = number, len(journal.header["streams"])
        self._maps: list[mmap.mmap] = []
        self._open = ExitStack()

    def __enter__(self) -> "StreamReader":
        segments = {commit.segment: 0 for commit in self._commits}
        self._held_in = [self._held[segment.parent] for segment in segments]
        for number, segment in enumerate(segments):
            segments[segment] = number
            with segment.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            self._maps.append(self._open.enter_context(mapped))
        blocks, places = [np.empty(0, INDEX)], [np.empty(0, np.int64)]
        for commit in self._commits:
            number = segments[commit.segment]
            n_entries = (commit.stop - commit.index) // INDEX.itemsize
            index = np.frombuffer(self._maps[number], INDEX, n_entries, commit.index)
            blocks.append(index[self._number :: self._n_streams])
            places.append(np.full(len(blocks[-1]), number))
        self._blocks, self._segments = np.concatenate(blocks), np.concatenate(places)
        self._dtypes = np.unique(self._blocks["dtype"][self._blocks["n_rows"] > 0]).tolist()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def runs(self) -> Runs:
        """The rows of each example in each block, ordered by (example_id, position).

        Rows of one example are adjacent in a block and ascend in position, so whole runs are moved.
        """
        runs = [np.empty((0, 4), np.int64)]
        for number, block in enumerate(self._blocks):
            if size := int(block["n_rows"]):
                numbers = self._elements(int(self._segments[number]), _INT32, 4)
                ids, positions = numbers[block["rows"] // 4 :][: 2 * size].reshape(2, size)
                starts = np.flatnonzero(np.diff(ids, prepend=np.int64(ids[0]) - 1))
                stops = starts + np.add.reduceat(positions >= 0, starts, dtype=np.int64)
                run = np.stack([ids[starts], np.full(starts.size, number), starts, stops], axis=1)
                runs.append(run[stops > starts])
        joined = np.concatenate(runs)
        self.forget()
        return joined[np.argsort(joined[:, 0], kind="stable")]

    def places(self, blocks: Any, rows: Any, pieces: Any) -> Places:
        """Find some rows, for all heads.

        Args:
            blocks: (K,) number of the block of each row.
            rows: (K,) its number there.
            pieces: (K,) ascending; rows of one number are read in one piece where that is worth it.
        """
        breaks = (np.flatnonzero(np.diff(pieces)) + 1).tolist()
        cuts = (np.flatnonzero((np.diff(blocks) != 0) | (np.diff(rows) != 1)) + 1).tolist()
        table, segments = self._blocks[blocks], self._segments[blocks]
        stretches = None
        if len(cuts) * _LONG_STRETCH <= len(rows):
            starts, stops = [0, *cuts], [*cuts, len(rows)]
            stretches = [
                _Stretch(
                    int(segments[start]),
                    int(table["vectors"][start]),
                    int(table["n_rows"][start]),
                    int(rows[start]),
                    stop - start,
                )
                for start, stop in zip(starts, stops, strict=True)
                if stop > start
            ]
        if len(breaks) * _LONG_STRETCH > len(rows):
            breaks = []
        return Places(table, segments, rows, breaks, stretches)

    def numbers(self, places: Places) -> tuple[npt.NDArray[Any], ...]:
        """Position, bucket and window (-1 for none) of some rows: three int32 arrays."""
        table = places.table
        first = table["rows"] // 4 + places.rows
        position, bucket = (
            self._gather(_INT32, 4, places.segments, numbers)
            for numbers in (first + table["n_rows"], first + 2 * table["n_rows"])
        )
        return position, bucket, table["window"]

    def vectors(self, head: int, places: Places) -> list[npt.NDArray[np.float32]]:
        """The vectors of some rows of one head, in pieces of (n, head_dim).

        Long stretches of float32 rows are views of the memory map and cost no copy; let go of them
        before ``forget``.

        Args:
            head: Its number among the stream's captured heads.
            places: Those of the rows.
        """
        if places.rows.size == 0:
            return []
        before = np.array([held.index(self._heads[head]) for held in self._held_in], np.int64)
        if len(self._dtypes) == 1 and places.stretches is not None:
            return self._stretches(before, places.breaks, places.stretches)
        vectors = np.empty((len(places.rows), self.head_dim), np.float32)
        for code in self._dtypes:
            chosen = np.flatnonzero(places.table["dtype"] == code)
            table, dtype = places.table[chosen], _NUMPY_DTYPES[DTYPES[code]]
            segments = places.segments[chosen]
            width = dtype.itemsize * self.head_dim
            first = (
                table["vectors"] + (before[segments] * table["n_rows"] + places.rows[chosen]) * width
            )
            step = gcd(width, ALIGNMENT)
            raw: Any = self._gather(np.dtype((np.void, width)), step, segments, first // step)
            vectors[chosen] = _as_float32(raw.view(dtype).reshape(-1, self.head_dim), DTYPES[code])
        if len(self._dtypes) > 1:
            return [vectors]
        return np.split(vectors, places.breaks)

    def _stretches(
        self, before: npt.NDArray[np.int64], breaks: list[int], stretches: "list[_Stretch]"
    ) -> list[npt.NDArray[np.float32]]:
        """Adjacent vectors, as they lie in the memory maps.

        Args:
            before: (S,) how many heads each segment has before the one that is read.
            breaks: As in ``Places``.
            stretches: As in ``Places``.
        """
        name = DTYPES[self._dtypes[0]]
        dtype = _NUMPY_DTYPES[name]
        width = dtype.itemsize * self.head_dim
        pieces: list[list[npt.NDArray[Any]]] = [[]]
        ends, done = iter([*breaks, -1]), 0
        end = next(ends)
        for stretch in stretches:
            if done == end:
                pieces.append([])
                end = next(ends)
            first = int(before[stretch.segment]) * stretch.n_rows + stretch.first
            place = stretch.vectors + first * width
            shape = stretch.length, self.head_dim
            pieces[-1].append(np.ndarray(shape, dtype, self._maps[stretch.segment], place))
            done += stretch.length
        return [
            _as_float32(parts[0] if len(parts) == 1 else np.concatenate(parts), name)
            for parts in pieces
        ]

    def forget(self) -> None:
        """Give back the pages that have been read, so that memory does not grow with the journal."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _gather(self, dtype: np.dtype[Any], step: int, segments: Any, places: Any) -> npt.NDArray[Any]:
        """The elements that begin at ``places`` times ``step`` bytes of their segments."""
        out = np.empty(len(places), dtype)
        for segment in range(len(self._maps)):
            chosen = segments == segment
            out[chosen] = self._elements(segment, dtype, step)[places[chosen]]
        return out

    def _elements(self, segment: int, dtype: np.dtype[Any], step: int) -> npt.NDArray[Any]:
        """A segment as overlapping elements of ``dtype``, one at every ``step`` bytes."""
        mapped = self._maps[segment]
        size = max(0, (len(mapped) - dtype.itemsize) // step + 1)
        return np.ndarray((size,), dtype, mapped, strides=(step,))


def _as_float32(vectors: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (vectors.astype(np.uint32) << 16).view(np.float32)
    return vectors.astype(np.float32, copy=False)

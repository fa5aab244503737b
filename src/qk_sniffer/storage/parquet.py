"""Per-head Parquet files, a bounded number of rows at a time, from a journal and from earlier files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.errors import UserError
from qk_sniffer.ids import EVERY_EXAMPLE, ExampleFilter
from qk_sniffer.kinds import SOFTMAX_COLUMNS
from qk_sniffer.storage.file_facts import (
    FILE_NAME,
    FileFacts,
    describe_file,
    describe_head_files,
    file_names,
    is_described,
)
from qk_sniffer.storage.files import replacing, sync_directory
from qk_sniffer.storage.head_parts import HeadParts, completed, give_names
from qk_sniffer.storage.non_finite import NonFinite
from qk_sniffer.storage.reader import Runs, StreamReader
from qk_sniffer.storage.schema import PULLED_DIRECTORY, head_schema
from qk_sniffer.storage.statistics import as_columns, as_values
from qk_sniffer.storage.stored_rows import StoredRows, require_columns, stored_batches

ROW_GROUP_BYTES = 32 * 2**20
"""Size of the vectors in a row group: enough for a column chunk to compress and read well."""

_NUMBERS = ("bucket", "example_id", "position", "sliding_window", "token_str")
"""Columns that the heads of a layer and kind share."""

TokensOf = Callable[[int], pa.Array]


@dataclass(frozen=True)
class EarlierFiles:
    """One head's files of a finished run, whose rows are merged.

    Attributes:
        directory: Where they are.
        facts: What the run's manifest says of each, in order.
        selects: The examples whose rows are taken.
    """

    directory: Path
    facts: Mapping[Path, FileFacts]
    selects: ExampleFilter

    def require_intact(self, paths: Iterable[Path]) -> None:
        """See that some of the files are what the manifest describes; others are passed over.

        Raises:
            UserError: One is not.
        """
        for path in paths:
            if path not in self.facts or is_described(path, self.facts[path]):
                continue
            remedy = "restore it from a copy, or set sniffer.output.overwrite to true to start anew"
            if PULLED_DIRECTORY in path.parts:
                remedy = f"remove {path.parents[1]}, which the next run pulls again"
            raise UserError(f"{path}: damaged, it is not what the manifest describes; {remedy}")


@dataclass(frozen=True)
class HeadFiles:
    """The files of one head that are to be written.

    Attributes:
        directory: Where they are.
        number: Index of the head into the stream's captured heads.
        earlier: The files of finished runs that are merged into it; none has an example of another.
    """

    directory: Path
    number: int
    earlier: tuple[EarlierFiles, ...] = ()


def write_heads(
    stream: StreamReader,
    files: Sequence[HeadFiles],
    tokens: TokensOf | None,
    digest: str,
    statistics: StreamReader | None = None,
) -> list[tuple[FileFacts, NonFinite]]:
    """Write some heads of one layer and kind; their files have their names when they are complete.

    Files that hold ``digest`` already, from an attempt that was cut off, stay as they are, and those
    of a finished run that hold it are moved. The journal gives no examples that a finished run has.

    Args:
        stream: The journal's rows of the layer and kind.
        files: The heads; all of them have files of the same finished runs.
        tokens: Gives the token strings of an example; None leaves token_str null.
        digest: Names the examples that the files hold in the end.
        statistics: The statistics of the same rows, for queries that have them.

    Returns:
        What the manifest says of each head, with the number of rows that are not finite where there are
        any; and those rows.

    Raises:
        UserError: A file that is to be merged is damaged.
    """
    counted: dict[Path, NonFinite] = {}
    missing = [head for head in files if not _is_there(head, digest)]
    if missing:
        with ExitStack() as stack:
            heads = [
                stack.enter_context(_HeadWriter(head, stream, digest, statistics)) for head in missing
            ]
            runs = _merge(stream.runs(), heads[0].earlier)
            for ids, blocks, rows, pieces in _row_groups(runs, stream.head_dim):
                numbers = _Numbers(stream, ids, blocks, rows, pieces, tokens, heads[0], statistics)
                for head in heads:
                    head.write(numbers)
                stream.forget()
                if statistics is not None:
                    statistics.forget()
            counted = {head.directory: head.non_finite for head in heads}
        # After all of them have their names: the first sync then brings most of the others along.
        for written in missing:
            sync_directory(written.directory)
    return [_describe_head(head.directory, counted.get(head.directory)) for head in files]


def _is_there(head: HeadFiles, digest: str) -> bool:
    """Whether the files of a head hold all rows that they are to hold, and have their names now.

    Those of a finished run elsewhere take the place of others whose rows they have.
    """
    # Where it is whole, no example of it was captured here.
    elsewhere = [
        earlier
        for earlier in head.earlier
        if earlier.directory != head.directory and not earlier.selects.ids.size
    ]
    files = completed(head.directory, [earlier.directory for earlier in elsewhere], digest)
    if files is None:
        return False
    for earlier in elsewhere:
        earlier.require_intact(files)
    head.directory.mkdir(exist_ok=True)
    give_names(head.directory, files, file_names(len(files)))
    return True


def write_table(path: Path, table: pa.Table) -> FileFacts:
    """Write a whole table; it appears under its name only when it is complete."""
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        pq.write_table(table, sink, compression="zstd")
    return describe_file(path)


def _describe_head(directory: Path, non_finite: NonFinite | None) -> tuple[FileFacts, NonFinite]:
    """A head's files; their rows are read again where they were not written just now."""
    paths = sorted(path for path in directory.iterdir() if FILE_NAME.fullmatch(path.name))
    if non_finite is None:
        non_finite = NonFinite()
        for batch in stored_batches(paths, ["example_id", "vector"], EVERY_EXAMPLE):
            non_finite.count(batch["example_id"], [_as_rows(batch["vector"])])
    more = {"non_finite": non_finite.rows} if non_finite.rows else {}
    return describe_head_files(directory, len(paths)) | more, non_finite


def _as_rows(vectors: Any) -> npt.NDArray[np.float32]:
    """The values of an Arrow column of vectors, (n, head_dim)."""
    rows: npt.NDArray[np.float32] = vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size)
    return rows


def _merge(new: Runs, earlier: Sequence["_EarlierRows"]) -> Runs:
    """Runs of the journal and of earlier files, ordered by example_id."""
    stored = [rows.runs(number) for number, rows in enumerate(earlier)]
    for runs in stored:
        new = new[~np.isin(new[:, 0], runs[:, 0])]
    runs = np.concatenate([new, *stored])
    return runs[np.argsort(runs[:, 0], kind="stable")]


def _stored_block(number: int) -> int:
    """What stands for a block of the journal in the runs of an earlier file."""
    return -1 - number


def _row_groups(runs: Runs, head_dim: int) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Example id, block, number in the block and piece of the rows of each row group."""
    rows_at_once = max(1, ROW_GROUP_BYTES // (4 * head_dim))
    ids, blocks, starts, stops = runs.T
    pieces = _pieces(runs)
    ends = np.cumsum(stops - starts)
    total = int(ends[-1]) if ends.size else 0
    for first in range(0, total, rows_at_once):
        numbers = np.arange(first, min(first + rows_at_once, total))
        run = np.searchsorted(ends, numbers, side="right")
        yield ids[run], blocks[run], stops[run] - (ends[run] - numbers), pieces[run]


def _pieces(runs: Runs) -> npt.NDArray[np.int64]:
    """Number the pieces in which runs are written: (R,).

    A writer's pages end with its pieces, so that these may not depend on how a journal was written: the
    passages of an example are one piece, and examples that follow each other in a batch share theirs.
    """
    ids, blocks, starts, stops = runs.T
    if not ids.size:
        return np.empty(0, np.int64)
    firsts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    before, after = firsts[:-1], firsts[1:]
    begins = np.zeros(ids.size, np.int64)
    begins[after] = (blocks[after] != blocks[before]) | (starts[after] != stops[before])
    return begins.cumsum()


class _Numbers:
    """Everything but the vectors of the rows of a row group, made once for all heads."""

    def __init__(
        self,
        stream: StreamReader,
        ids: npt.NDArray[np.int64],
        blocks: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        pieces: npt.NDArray[np.int64],
        tokens: TokensOf | None,
        first_head: "_HeadWriter",
        statistics: StreamReader | None,
    ) -> None:
        self.size = len(rows)
        self.new = new = np.flatnonzero(blocks >= 0)
        self.stored = [
            np.flatnonzero(blocks == _stored_block(number)) for number in range(len(first_head.earlier))
        ]
        self.places = stream.places(blocks[new], rows[new], pieces[new])
        if statistics is not None:
            # The blocks of the statistics are those of the queries.
            self.statistics = statistics.places(blocks[new], rows[new], np.zeros_like(new))
        positions, buckets, windows = stream.numbers(self.places)
        self.columns = pa.table(
            {
                "bucket": buckets,
                "example_id": ids[new].astype(np.int32),
                "position": positions,
                "sliding_window": pa.array(windows, mask=windows < 0),
                "token_str": pa.nulls(len(new), pa.string())
                if tokens is None
                else _token_strings(tokens, ids[new], positions),
            }
        )
        if new.size < self.size:
            earlier = [
                rows.numbers.take(places.size)
                for rows, places in zip(first_head.earlier, self.stored, strict=True)
            ]
            order = np.empty(self.size, np.int64)
            order[np.concatenate([new, *self.stored])] = np.arange(self.size)
            self.columns = pa.concat_tables([self.columns, *earlier]).take(order)


def _token_strings(tokens: TokensOf, ids: npt.NDArray[Any], positions: npt.NDArray[Any]) -> Any:
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    parts = np.split(positions, starts[1:]) if ids.size else []
    return pa.chunked_array(
        [
            tokens(int(ids[start])).take(pa.array(part))
            for start, part in zip(starts, parts, strict=True)
        ],
        pa.string(),
    )


class _EarlierRows:
    """The rows of earlier files that are merged, in their order."""

    def __init__(self, files: EarlierFiles, schema: pa.Schema) -> None:
        self._paths, self._selects = [*files.facts], files.selects
        files.require_intact(self._paths)
        for path in self._paths:
            require_columns(path, schema)
        self.vectors = self._rows(["vector"])
        self.numbers = self._rows(list(_NUMBERS))
        if "lse" in schema.names:
            self.statistics = self._rows(list(SOFTMAX_COLUMNS))

    def _rows(self, columns: list[str]) -> StoredRows:
        return StoredRows(self._paths, columns, self._selects)

    def runs(self, number: int) -> Runs:
        """The runs of these files, as those of the block that stands for them."""
        runs = [np.empty((0, 4), np.int64)]
        first = 0
        for batch in stored_batches(self._paths, ["example_id"], self._selects):
            ids = batch["example_id"].to_numpy().astype(np.int64)
            starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
            stops = np.append(starts[1:], ids.size)
            blocks = np.full(starts.size, _stored_block(number))
            runs.append(np.stack([ids[starts], blocks, first + starts, first + stops], axis=1))
            first += ids.size
        return np.concatenate(runs)


class _HeadWriter:
    """Writes one head's files, reading the rows of earlier ones in their order."""

    def __init__(
        self, head: HeadFiles, stream: StreamReader, digest: str, statistics: StreamReader | None
    ) -> None:
        self._head = head
        self.directory = head.directory
        self.non_finite = NonFinite()
        self._stream, self._statistics = stream, statistics
        self._schema = head_schema(stream.head_dim, softmax=statistics is not None)
        self._parts = HeadParts(head.directory, self._schema, digest)
        self.earlier: list[_EarlierRows] = []

    def __enter__(self) -> "_HeadWriter":
        self.earlier = [_EarlierRows(files, self._schema) for files in self._head.earlier]
        self._parts.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._parts.__exit__(*error)

    def write(self, numbers: _Numbers) -> None:
        """Write one row group."""
        pieces = self._stream.vectors(self._head.number, numbers.places)
        if numbers.new.size < numbers.size:
            pieces = [self._with_stored(pieces, numbers)]
        self.non_finite.count(numbers.columns["example_id"], pieces)
        kind = self._schema.field("vector").type
        column = pa.chunked_array(
            [
                pa.FixedSizeListArray.from_arrays(pa.array(piece.reshape(-1)), type=kind)
                for piece in pieces
            ],
            kind,
        )
        columns = {name: numbers.columns[name] for name in numbers.columns.column_names}
        if self._statistics is not None:
            columns |= as_columns(self._all_statistics(self._statistics, numbers))
        table = pa.table(columns | {"vector": column}, schema=self._schema)
        self._parts.write(table)

    def _with_stored(self, pieces: Any, numbers: _Numbers) -> npt.NDArray[np.float32]:
        """The journal's vectors and those of the earlier files, each in its place."""
        head_dim = self._stream.head_dim
        vectors = np.empty((numbers.size, head_dim), np.float32)
        for rows, places in zip(self.earlier, numbers.stored, strict=True):
            stored = rows.vectors.take(places.size)["vector"].combine_chunks()
            vectors[places] = _as_rows(stored)
        if pieces:
            vectors[numbers.new] = np.concatenate(pieces)
        return vectors

    def _all_statistics(self, statistics: StreamReader, numbers: _Numbers) -> npt.NDArray[np.float32]:
        """The statistics of a row group: (N, 6)."""
        values = np.empty((numbers.size, statistics.head_dim), np.float32)
        if pieces := statistics.vectors(self._head.number, numbers.statistics):
            values[numbers.new] = np.concatenate(pieces)
        for rows, places in zip(self.earlier, numbers.stored, strict=True):
            values[places] = as_values(rows.statistics.take(places.size))
        return values

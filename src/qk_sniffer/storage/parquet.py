"""Per-head Parquet files from the blocks of a journal, a bounded number of rows at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.storage.files import replacing
from qk_sniffer.storage.journal import Block
from qk_sniffer.storage.schema import head_schema

ROW_GROUP_BYTES = 32 * 2**20
"""Size of the vectors in a row group: enough for a column chunk to compress and read well."""

Tokens = dict[int, pa.Array]
FileFacts = dict[str, Any]
Runs = npt.NDArray[np.int64]


def sorted_runs(blocks: Sequence[Block]) -> Runs:
    """Order the rows of some blocks by (example_id, position) without sorting single rows.

    Rows of one example are adjacent in a block and ascend in position, so whole runs are moved.

    Returns:
        (R, 3) int64: block number, first row and row after the last of each run.
    """
    runs = []
    for number, block in enumerate(blocks):
        example_ids, positions, _ = block.rows
        starts = np.flatnonzero(np.diff(example_ids, prepend=example_ids[0] - 1))
        stops = np.append(starts[1:], example_ids.size)
        runs.append(
            np.stack(
                [
                    example_ids[starts].astype(np.int64),
                    positions[starts].astype(np.int64),
                    np.full(starts.size, number),
                    starts,
                    stops,
                ],
                axis=1,
            )
        )
    if not runs:
        return np.empty((0, 3), np.int64)
    joined = np.concatenate(runs)
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    return np.ascontiguousarray(joined[order, 2:])


def write_head(
    blocks: Sequence[Block],
    runs: Runs,
    head_dim: int,
    tokens: Tokens | None,
    path: Path,
    head_number: int,
) -> FileFacts:
    """Write one head's file; it appears under its name only when it is complete.

    Args:
        blocks: The blocks of the head's layer and kind.
        runs: Their order, from ``sorted_runs``.
        head_dim: Width of a vector.
        tokens: The token strings of each example; None leaves token_str null.
        path: The file.
        head_number: Index of the head into the blocks' vectors.
    """
    schema = head_schema(head_dim)
    rows_at_once = max(1, ROW_GROUP_BYTES // (4 * head_dim))
    with replacing(path) as temporary, _writer(temporary, schema) as writer:
        for pieces in _bounded(runs, rows_at_once):
            table = _table(schema, blocks, pieces, head_number, tokens)
            writer.write_table(table, row_group_size=table.num_rows)
    return describe_file(path)


def write_table(path: Path, table: pa.Table) -> FileFacts:
    """Write a whole table; it appears under its name only when it is complete."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return describe_file(path)


def describe_file(path: Path) -> FileFacts:
    """Rows, size in bytes and SHA-256 of a Parquet file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = pq.read_metadata(path).num_rows
    return {"rows": rows, "bytes": path.stat().st_size, "sha256": digest}


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    numbers = ["bucket", "example_id", "position", "sliding_window"]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=["bucket", "example_id", "sliding_window", "token_str"],
        column_encoding={
            "position": "DELTA_BINARY_PACKED",
            "vector.list.element": "BYTE_STREAM_SPLIT",
        },
        write_statistics=numbers,
        sorting_columns=[
            pq.SortingColumn(schema.get_field_index(name)) for name in ("example_id", "position")
        ],
    )


def _bounded(runs: Runs, rows_at_once: int) -> Iterator[list[tuple[int, int, int]]]:
    """Consecutive runs of ``rows_at_once`` rows together, cut where they don't fit."""
    pieces: list[tuple[int, int, int]] = []
    room = rows_at_once
    for block, start, stop in runs.tolist():
        while start < stop:
            end = min(stop, start + room)
            pieces.append((block, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], rows_at_once
    if pieces:
        yield pieces


def _table(
    schema: pa.Schema,
    blocks: Sequence[Block],
    pieces: Iterable[tuple[int, int, int]],
    head_number: int,
    tokens: Tokens | None,
) -> pa.Table:
    parts = [(blocks[number], start, stop) for number, start, stop in pieces]
    example_ids, positions, buckets = np.concatenate(
        [block.rows[:, start:stop] for block, start, stop in parts], axis=1
    )
    vectors = np.concatenate(
        [_as_float32(b.vectors[head_number, start:stop], b.dtype) for b, start, stop in parts]
    )
    columns: dict[str, Any] = {
        "bucket": buckets,
        "example_id": example_ids,
        "position": positions,
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), type=schema.field("vector").type
        ),
        "sliding_window": pa.chunked_array(
            [
                pa.repeat(pa.scalar(block.sliding_window, pa.int32()), stop - start)
                for block, start, stop in parts
            ]
        ),
        "token_str": pa.nulls(len(positions), pa.string())
        if tokens is None
        else pa.chunked_array(
            [
                tokens[int(block.rows[0, start])].take(pa.array(block.rows[1, start:stop]))
                for block, start, stop in parts
            ]
        ),
    }
    return pa.table(columns, schema=schema)


def _as_float32(vectors: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (vectors.astype(np.uint32) << 16).view(np.float32)
    return vectors.astype(np.float32, copy=False)

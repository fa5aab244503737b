"""Rows of a head's files as they are read back, a bounded number at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qk_sniffer.ids import EVERY_EXAMPLE, ExampleFilter
from qk_sniffer.storage.files import damaged

_ROWS_AT_ONCE = 2**14
_READ_AT_ONCE = 2**20
_MAY_BE_NULL = ("sliding_window", "token_str")


class StoredRows:
    """The rows of some columns of a head's files, in order and a bounded number at a time."""

    def __init__(
        self, paths: Sequence[Path], columns: list[str], selects: ExampleFilter = EVERY_EXAMPLE
    ) -> None:
        self._schema = pa.schema([pq.read_schema(paths[0]).field(name) for name in columns])
        self._batches = stored_batches(paths, columns, selects)
        self._rest: list[pa.RecordBatch] = []

    def take(self, count: int) -> pa.Table:
        """The next rows; fewer at the end."""
        size = sum(batch.num_rows for batch in self._rest)
        while size < count and (batch := next(self._batches, None)) is not None:
            self._rest.append(batch)
            size += batch.num_rows
        table = pa.Table.from_batches(self._rest, self._schema)
        self._rest = table.slice(count).to_batches()
        return table.slice(0, count)


def stored_batches(
    paths: Sequence[Path], columns: list[str], selects: ExampleFilter
) -> Iterator[pa.RecordBatch]:
    """Rows of some columns of a head's files, a bounded number at a time.

    Args:
        paths: The files, in order.
        columns: Those that are read.
        selects: The examples whose rows are taken.

    Raises:
        UserError: A value is missing.
    """
    asked = [*dict.fromkeys([*columns, "example_id"])] if selects.ids.size else columns
    for path in paths:
        # Buffered whole columns would stay in memory as long as the file is open.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AT_ONCE) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=asked, use_threads=False):
                if fault := fault_of_values(batch):
                    raise damaged(path, fault)
                if selects.ids.size:
                    batch = batch.filter(pa.array(selects(batch["example_id"].to_numpy())))
                if batch.num_rows:
                    yield batch.select(columns)


def fault_of_columns(path: Path, schema: pa.Schema) -> str | None:
    """What is wrong with the columns of a Parquet file; None where they are those of a schema."""
    stored = pq.read_schema(path)
    if stored.equals(schema):
        return None
    wrong = [field.name for field in schema if not _has(stored, field)]
    wrong += [name for name in stored.names if name not in schema.names]
    return f"other columns than the schema has, see {', '.join(wrong or ['the order'])}"


def _has(schema: pa.Schema, field: pa.Field) -> bool:
    index = schema.get_field_index(field.name)
    return index >= 0 and bool(schema.field(index).equals(field))


def require_columns(path: Path, schema: pa.Schema) -> None:
    """See that a Parquet file has the columns of a schema.

    Raises:
        UserError: It has others.
    """
    if fault := fault_of_columns(path, schema):
        raise damaged(path, fault)


def fault_of_values(rows: pa.RecordBatch | pa.Table) -> str | None:
    """Which value of a head's file is missing; None where each is there that must be."""
    for name in rows.schema.names:
        if name not in _MAY_BE_NULL and rows[name].null_count:
            return f"{name} has no value in some rows"
        if name == "vector" and pc.list_flatten(rows[name]).null_count:
            return "some vectors have gaps"
    return None

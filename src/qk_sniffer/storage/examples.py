"""The table of texts of a finished run, as it is read back."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qk_sniffer.errors import first_line
from qk_sniffer.storage.files import damaged
from qk_sniffer.storage.schema import EXAMPLES_SCHEMA


def read_examples(
    path: Path, columns: Sequence[str] | None = None, schema: pa.Schema = EXAMPLES_SCHEMA
) -> pa.Table:
    """The rows of a table of texts.

    Args:
        path: Its file.
        columns: Those that are read; None reads all.
        schema: The types of the table, as ``examples_schema`` gives them.

    Raises:
        UserError: It is no such table, or a text has no id, shares it, or has a negative length.
    """
    columns = schema.names if columns is None else columns
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise damaged(path, f"it has no column {missing[0]}")
            table = file.read(columns=list(columns))
        table = table.cast(pa.schema([schema.field(name) for name in columns]))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, f"it can't be read ({first_line(error)})") from error
    for name in columns:
        if not schema.field(name).nullable and table[name].null_count:
            raise damaged(path, f"{name} has no value in some rows")
    if "example_id" in columns and pc.count_distinct(table["example_id"]).as_py() < table.num_rows:
        raise damaged(path, "an example_id is repeated")
    if "n_tokens" in columns and table.num_rows and pc.min(table["n_tokens"]).as_py() < 0:
        raise damaged(path, "n_tokens is negative in some rows")
    return table

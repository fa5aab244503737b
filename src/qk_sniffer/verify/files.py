"""Is a Parquet file what the manifest says of it?"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.errors import first_line
from qk_sniffer.storage import FileFacts, checksum, fault_of_columns

UNREADABLE = (OSError, pa.ArrowException)


def check_file(
    data_root: Path, label: str, facts: FileFacts, schema: pa.Schema
) -> tuple[Path | None, list[str]]:
    """A Parquet file if its rows can be trusted to be what was written, and its faults.

    Args:
        data_root: The data root.
        label: Its path there.
        facts: What the manifest says of it.
        schema: Its columns.
    """
    path = data_root / label
    if not path.exists():
        return None, [f"{label}: missing"]
    if path.stat().st_size != facts["bytes"]:
        return None, [
            f"{label}: damaged, it has {path.stat().st_size} bytes and not {facts['bytes']} as in the "
            "manifest"
        ]
    if checksum(path) != facts["xxh3_128"]:
        return None, [f"{label}: damaged, its checksum is not that of the manifest"]
    try:
        fault, rows = fault_of_columns(path, schema), pq.read_metadata(path).num_rows
    except UNREADABLE as error:
        return None, [f"{label}: can't be read ({first_line(error)})"]
    if fault is not None:
        return None, [f"{label}: {fault}"]
    if rows != facts["rows"]:
        return path, [f"{label}: {rows} rows, and the manifest says {facts['rows']}"]
    return path, []

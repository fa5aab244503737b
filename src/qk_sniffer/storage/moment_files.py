"""The Parquet files of moments: their rows from tables and back, some layers at a time.

A row group holds a few rows of a layer, so that one head is read without the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.moments import NO_BUCKET, MomentTable
from qk_sniffer.storage.file_facts import FileFacts, describe_file
from qk_sniffer.storage.schema import moment_schema

_NUMBERS = ("layer_idx", "head", "bucket", "pre_rope", "count", "position_sum", "position_square_sum")
"""Columns with one number a row; the others have lists."""

_SQUARES = ("covariance", "key_covariance")

_ROWS_OF_GROUP = 16
"""Some 2 MB where vectors have 128 coordinates; a layer of 32 heads with buckets has a hundred."""


def moment_schemas(header: Mapping[str, Any]) -> dict[Kind, pa.Schema]:
    """The columns of the moments of each kind that a run captures.

    Args:
        header: A journal's header, whose settings have moments.
    """
    widths: dict[Kind, set[int]] = {}
    for stream in header["streams"]:
        if stream["kind"] in KINDS:
            widths.setdefault(stream["kind"], set()).add(stream["head_dim"])
    cross = header["settings"]["moments"]["cross"]
    return {kind: moment_schema(kind, found, cross=cross) for kind, found in widths.items()}


def write_moments(path: Path, schema: pa.Schema, layers: Iterable[Sequence[MomentTable]]) -> None:
    """Write the moments of a kind.

    Args:
        path: The file.
        schema: Its columns.
        layers: Tables of each layer, in order.
    """
    vectors = [name for name in schema.names if name not in _NUMBERS]
    with (
        pa.OSFile(str(path), "wb") as sink,
        pq.ParquetWriter(
            sink,
            schema,
            compression="zstd",
            use_dictionary=[*_NUMBERS],
            write_statistics=[*_NUMBERS],
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in vectors},
        ) as writer,
    ):
        for tables in layers:
            for table in tables:
                writer.write_table(_as_arrow(table, schema), row_group_size=_ROWS_OF_GROUP)


def read_layer(path: Path, layer_idx: int) -> pa.Table:
    """The rows of a layer."""
    return pq.read_table(path, filters=[("layer_idx", "=", layer_idx)])


def fault_of_moments(rows: pa.Table) -> str | None:
    """Which value of a file of moments is missing; None where each is there that must be."""
    for name in rows.column_names:
        if name != "bucket" and rows[name].null_count:
            return f"{name} has no value in some rows"
    if pc.any(pc.less(rows["count"], 1)).as_py():
        return "some rows count no tokens"
    widths = pc.list_value_length(rows["mean"])
    for name in (name for name in rows.column_names if name not in _NUMBERS):
        expected = pc.multiply(widths, widths) if name in _SQUARES else widths
        if pc.any(pc.not_equal(pc.list_value_length(rows[name]), expected)).as_py():
            return f"{name} has other numbers of values than the mean"
        if pc.list_flatten(rows[name]).null_count:
            return f"{name} has gaps"
    return None


def as_moments(rows: pa.Table) -> list[MomentTable]:
    """Rows of such a file as tables of one width each, in their order."""
    rows = rows.combine_chunks()
    widths = pc.list_value_length(rows["mean"]).to_numpy()
    return [_as_moments(rows.filter(pa.array(widths == width))) for width in np.unique(widths)]


def _as_moments(rows: pa.Table) -> MomentTable:
    columns = {name: rows[name].to_numpy() for name in _NUMBERS if name != "bucket"}
    count = columns["count"]
    keys: dict[str, Any] = {}
    if "key_mean" in rows.column_names:
        keys["key_mean"] = _vectors(rows, "key_mean")
        keys["key_products"] = _products(rows, "key_covariance")
    return MomentTable(
        **columns,
        **keys,
        bucket=rows["bucket"].fill_null(NO_BUCKET).to_numpy(),
        mean=_vectors(rows, "mean"),
        products=_products(rows, "covariance"),
        position_products=_vectors(rows, "position_covariance") * count[:, None],
    )


def _vectors(rows: pa.Table, name: str) -> npt.NDArray[np.float64]:
    values = pc.list_flatten(rows[name]).to_numpy()
    vectors: npt.NDArray[np.float64] = values.reshape(rows.num_rows, -1)
    return vectors


def _products(rows: pa.Table, name: str) -> npt.NDArray[np.float64]:
    values = _vectors(rows, name) * rows["count"].to_numpy()[:, None]
    width = round(values.shape[1] ** 0.5)
    products: npt.NDArray[np.float64] = values.reshape(-1, width, width)
    return products


def _as_arrow(table: MomentTable, schema: pa.Schema) -> pa.Table:
    count = table.count[:, None, None]
    lists = {
        "mean": table.mean,
        # A sum of products need not be the same above and below its diagonal to the last bit.
        "covariance": (table.products + table.products.transpose(0, 2, 1)) / (2 * count),
        "position_covariance": table.position_products / count[:, 0],
    }
    if table.key_mean is not None and table.key_products is not None:
        lists |= {"key_mean": table.key_mean, "key_covariance": table.key_products / count}
    columns = {name: pa.array(getattr(table, name)) for name in _NUMBERS} | {
        "bucket": pa.array(table.bucket, mask=table.bucket == NO_BUCKET)
    }
    for name, values in lists.items():
        columns[name] = _as_lists(values.reshape(len(table), -1), schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _as_lists(values: npt.NDArray[np.float64], kind: pa.DataType) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def describe_moment_file(path: Path) -> FileFacts:
    """What a manifest says of a file of moments, with the number of rows that are not finite."""
    n_rows = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            n_rows += int(is_not_finite(file.read_row_group(number)).sum())
    return describe_file(path) | ({"non_finite": n_rows} if n_rows else {})


def is_not_finite(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows of such a file have an infinity or a NaN: (R,)."""
    wrong = np.zeros(rows.num_rows, np.bool_)
    for field in rows.schema:
        if pa.types.is_nested(field.type):
            is_finite = np.isfinite(pc.list_flatten(rows[field.name]).to_numpy())
            parents = pc.list_parent_indices(rows[field.name].combine_chunks()).to_numpy()
            wrong[parents[~is_finite]] = True
    return wrong


def count_tokens(path: Path) -> int:
    """The tokens that moments count, over all buckets: those of any head, since all read the same."""
    rows = pq.read_table(path, columns=["layer_idx", "head", "pre_rope", "count"])
    if not rows.num_rows:
        return 0
    first = rows.slice(0, 1)
    is_same = [pc.equal(rows[name], first[name][0]) for name in ("layer_idx", "head", "pre_rope")]
    return int(pc.sum(rows.filter(pc.and_(pc.and_(*is_same[:2]), is_same[2]))["count"]).as_py())

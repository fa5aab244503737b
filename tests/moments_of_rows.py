"""Moments in float64 NumPy, of rows that were all kept, and a data root that has them."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer import Captures
from qk_sniffer.kinds import Kind
from qk_sniffer.moments import NO_BUCKET, MomentTable, joined
from qk_sniffer.storage.file_facts import describe_file

Arrays = dict[str, np.ndarray[Any, Any]]


def expected(heads: Iterable[Arrays], keys: Iterable[Arrays] | None = None) -> dict[str, Any]:
    """Moments of the rows of some heads together, and of the keys at the same positions.

    Args:
        heads: Their rows, as ``Head.numpy`` gives them.
        keys: Those of the key head of each, in the same order.
    """
    every = [*heads]
    x = np.concatenate([rows["vector"] for rows in every]).astype(np.float64)
    p = np.concatenate([rows["position"] for rows in every]).astype(np.float64)
    n, off, p_off = len(x), x - x.mean(axis=0), p - p.mean()
    found = {
        "count": n,
        "mean": x.mean(axis=0),
        "covariance": off.T @ off / n,
        "position_mean": p.mean(),
        "position_variance": (p_off**2).mean(),
        "position_covariance": off.T @ p_off / n,
    }
    if keys is not None:
        k = np.concatenate([rows["vector"] for rows in keys]).astype(np.float64)
        found |= {"key_mean": k.mean(axis=0), "key_covariance": off.T @ (k - k.mean(axis=0)) / n}
    return found


def part(rows: Arrays, chosen: np.ndarray[Any, Any]) -> Arrays:
    return {name: values[chosen] for name, values in rows.items()}


def add_moments(
    root: Path, before: Path | None = None, *, by_bucket: bool = False, cross: bool = False
) -> None:
    """Write the files of moments into a data root whose rows were all kept.

    Args:
        root: The data root.
        before: One of the same texts whose vectors are those before RoPE; None leaves these out.
        by_bucket: Whether each bucket has a row.
        cross: Whether queries have the covariance with their keys.
    """
    captures = Captures(root)
    directory = root / "moments"
    directory.mkdir()
    facts: dict[str, Any] = {}
    for kind in dict.fromkeys(head.kind for head in captures.heads):
        tables = _tables(captures, kind, False, by_bucket, cross)
        if before is not None:
            tables += _tables(Captures(before), kind, True, by_bucket, cross) * (kind in "qk")
        path = directory / f"{kind}.parquet"
        pq.write_table(as_arrow(tables), path, row_group_size=4)
        facts[kind] = describe_file(path)
    ids = captures.examples["example_id"]
    pq.write_table(pa.table({"example_id": ids}), directory / "texts.parquet")
    facts["texts"] = describe_file(directory / "texts.parquet")
    manifest = json.loads((root / "manifest.json").read_text())
    flags = {"by_bucket": by_bucket, "pre_rope": before is not None, "cross": cross}
    manifest["settings"]["moments"] = {"enabled": True, **flags}
    manifest["moments"] = facts
    (root / "manifest.json").write_text(json.dumps(manifest))


def _tables(
    captures: Captures, kind: Kind, pre_rope: bool, by_bucket: bool, cross: bool
) -> list[MomentTable]:
    tables = []
    for head in (head for head in captures.heads if head.kind == kind):
        rows = head.numpy()
        keys = None
        if cross and kind == "q":
            keys = captures.key_head(head.layer.layer_idx, head.head).numpy()
        buckets = np.unique(rows["bucket"]) if by_bucket else [NO_BUCKET]
        for bucket in buckets:
            chosen = rows["bucket"] == bucket if by_bucket else np.full(len(rows["bucket"]), True)
            found = expected([part(rows, chosen)], keys and [part(keys, chosen)])
            own = _table_of(found, rows["position"][chosen].astype(np.int64))
            place = {"layer_idx": head.layer.layer_idx, "head": head.head, "bucket": bucket}
            place = {name: np.array([number], np.int32) for name, number in place.items()}
            tables.append(replace(own, **place, pre_rope=np.array([pre_rope])))
    return tables


def _table_of(found: dict[str, Any], positions: np.ndarray[Any, Any]) -> MomentTable:
    n, none = found["count"], np.zeros(1, np.int32)
    keys = {}
    if "key_mean" in found:
        keys = {"key_mean": found["key_mean"][None], "key_products": n * found["key_covariance"][None]}
    return MomentTable(
        layer_idx=none,
        head=none,
        bucket=none,
        pre_rope=none > 0,
        count=np.array([n]),
        position_sum=np.array([positions.sum()]),
        position_square_sum=np.array([(positions**2).sum()], np.float64),
        mean=found["mean"][None],
        products=n * found["covariance"][None],
        position_products=n * found["position_covariance"][None],
        **keys,
    )


def as_arrow(tables: list[MomentTable]) -> pa.Table:
    """What a file of moments holds; lists of one length are of a fixed size."""
    widths = {table.width for table in tables}
    fixed = len(widths) == 1
    by_width = [joined([t for t in tables if t.width == width]) for width in widths]
    parts = [_columns(table, fixed) for table in by_width]
    whole = pa.concat_tables(parts)
    return whole.sort_by([(name, "ascending") for name in ("layer_idx", "head", "pre_rope", "bucket")])


def _columns(table: MomentTable, fixed: bool) -> pa.Table:
    n = table.count[:, None]

    def lists(values: np.ndarray[Any, Any]) -> pa.Array:
        flat = values.reshape(len(values), -1)
        size = flat.shape[1] if fixed else -1
        own = pa.list_(pa.field("element", pa.float64()), size)
        return pa.array([*flat], own)

    columns = {name: pa.array(getattr(table, name)) for name in ("layer_idx", "head")}
    columns["bucket"] = pa.array(table.bucket, mask=table.bucket == NO_BUCKET)
    for name in ("pre_rope", "count", "position_sum", "position_square_sum"):
        columns[name] = pa.array(getattr(table, name))
    columns["mean"] = lists(table.mean)
    columns["covariance"] = lists(table.products / n[..., None])
    columns["position_covariance"] = lists(table.position_products / n)
    if table.key_mean is not None and table.key_products is not None:
        columns["key_mean"] = lists(table.key_mean)
        columns["key_covariance"] = lists(table.key_products / n[..., None])
    return pa.table(columns)

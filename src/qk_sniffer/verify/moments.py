"""Are the moments of a data root what its manifest, its settings and its examples say they must be?

How many tokens each row counts, and what their positions sum to, follows from the lengths of the texts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from qk_sniffer.capture import CapturedStream, Sampler
from qk_sniffer.errors import UserError
from qk_sniffer.storage import (
    EXAMPLES_DIRECTORY,
    MANIFEST_FILE,
    MOMENT_FILE,
    MOMENT_TEXTS,
    MOMENT_TEXTS_SCHEMA,
    MOMENTS_DIRECTORY,
    as_moments,
    fault_of_moments,
    is_not_finite,
    moment_file,
    moment_schema,
    stored_counted_ids,
)
from qk_sniffer.verify.files import check_file

_ROUNDING = 1e-6
"""How far below 0 a variance may be, against the largest of its head."""

_KEY = ("layer_idx", "head", "pre_rope", "bucket")
_Sums = dict[int | None, tuple[int, int, float]]
"""Tokens of each bucket, and the sums of their positions and of the squares of these."""


def check_moments(
    data_root: Path,
    manifest: Mapping[str, Any],
    streams: Sequence[CapturedStream],
    sampler: Sampler,
    examples: pa.Table | None,
) -> list[str]:
    """The faults of the files of moments, a line each.

    Args:
        data_root: The data root.
        manifest: Its manifest.
        streams: The captured heads of each layer and kind.
        sampler: Gives the buckets of positions.
        examples: The columns example_id and n_tokens of its texts; None where they can't be read.
    """
    settings, facts = manifest["settings"].get("moments"), manifest.get("moments", {})
    kinds = list(dict.fromkeys(stream.kind for stream in streams))
    expected = {moment_file(name) for name in (*kinds, MOMENT_TEXTS)} if settings else set()
    listed = {moment_file(name) for name in facts}
    there = {f"{MOMENTS_DIRECTORY}/{path.name}" for path in data_root.glob(f"{MOMENTS_DIRECTORY}/*")}
    faults = [f"{MANIFEST_FILE}: {path} is missing" for path in sorted(expected - listed)]
    faults += [f"{path}: not in the manifest" for path in sorted(listed - expected)]
    unknown = sorted(path for path in there - listed - expected if MOMENT_FILE.fullmatch(path))
    faults += [f"{path}: not in the manifest" for path in unknown]
    if settings is None or faults:
        return faults
    lengths, faults = _check_texts(data_root, manifest, examples)
    sums = None if lengths is None else _sums(lengths, sampler, by_bucket=settings["by_bucket"])
    for kind in kinds:
        own = [stream for stream in streams if stream.kind == kind]
        faults += _check_kind(data_root, settings, facts[kind], own, sums)
    return faults


def _check_texts(
    data_root: Path, manifest: Mapping[str, Any], examples: pa.Table | None
) -> tuple[npt.NDArray[np.int64] | None, list[str]]:
    """The tokens of each text that is counted, None where they can't be told; and faults."""
    label, facts = moment_file(MOMENT_TEXTS), manifest["moments"][MOMENT_TEXTS]
    path, faults = check_file(data_root, label, facts, MOMENT_TEXTS_SCHEMA)
    if path is None or examples is None:
        return None, faults
    try:
        counted = stored_counted_ids(data_root)
    except UserError as error:
        return None, [*faults, str(error)]
    captured = examples["example_id"].to_numpy()
    uncaptured, uncounted = np.setdiff1d(counted, captured), np.setdiff1d(captured, counted)
    if manifest["complete"]:
        for missing, where in ((uncaptured, EXAMPLES_DIRECTORY), (uncounted, label)):
            if missing.size:
                faults.append(
                    f"{label}: {where} lacks {missing.size} texts that the other has, as "
                    f"{missing[0]}; run predict again"
                )
    if uncaptured.size:
        return None, faults
    lengths = examples["n_tokens"].to_numpy().astype(np.int64)[np.isin(captured, counted)]
    if lengths.sum() != facts["tokens"]:
        faults.append(
            f"{label}: its texts have {lengths.sum()} tokens, and the manifest says {facts['tokens']}"
        )
    return lengths, faults


def _sums(lengths: npt.NDArray[np.int64], sampler: Sampler, *, by_bucket: bool) -> _Sums:
    """What rows count of texts of some lengths, by bucket; all positions have the bucket None."""
    positions = np.arange(lengths.max(initial=0))
    n_texts = len(lengths) - np.searchsorted(np.sort(lengths), positions, side="right")
    buckets = sampler.buckets(torch.from_numpy(positions)).numpy()
    names, groups = np.unique(buckets if by_bucket else np.zeros_like(positions), return_inverse=True)
    sums: _Sums = {}
    for number, name in enumerate(names.tolist()):
        some, times = positions[groups == number], n_texts[groups == number]
        squares = float(some.astype(np.float64) ** 2 @ times)
        sums[name if by_bucket else None] = (int(times.sum()), int(some @ times), squares)
    return sums


def _check_kind(
    data_root: Path,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    streams: Sequence[CapturedStream],
    sums: _Sums | None,
) -> list[str]:
    """The file of one kind."""
    kind, widths = streams[0].kind, {stream.width for stream in streams}
    label = moment_file(kind)
    assert kind != "softmax"
    schema = moment_schema(kind, widths, cross=settings["cross"])
    path, faults = check_file(data_root, label, dict(facts), schema)
    if path is None:
        return faults
    stages = (False, True) if settings["pre_rope"] and kind in "qk" else (False,)
    if sums is not None:
        faults += _check_keys(path, label, streams, stages, sums)
    n_wrong = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number)
            if fault := fault_of_moments(rows):
                return [*faults, f"{label}: {fault}"]
            wrong = is_not_finite(rows)
            n_wrong += int(wrong.sum())
            faults += _faults_of_values(label, rows.filter(pa.array(~wrong)))
    if n_wrong != (told := facts.get("non_finite", 0)):
        faults.append(f"{label}: {n_wrong} rows hold inf or NaN, and the manifest says {told}")
    return faults


def _check_keys(
    path: Path,
    label: str,
    streams: Sequence[CapturedStream],
    stages: Sequence[bool],
    sums: _Sums,
) -> list[str]:
    """Whether each head has one row for each stage and bucket, in order, of the tokens of the texts."""
    expected = [
        (stream.layer.layer_idx, head, stage, bucket, *counted)
        for stream in sorted(streams, key=lambda stream: stream.layer.layer_idx)
        for head in stream.heads
        for stage in stages
        for bucket, counted in sums.items()
    ]
    names = [*_KEY, "count", "position_sum", "position_square_sum"]
    table = pq.read_table(path, columns=names)
    stored = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    for number, (found, wanted) in enumerate(zip(stored, expected, strict=False)):
        if found[:4] != wanted[:4]:
            return [
                f"{label}: row {number} has ({', '.join(_KEY)}) {found[:4]} where {wanted[:4]} must "
                "follow: a row is lost, repeated or out of order"
            ]
        if found[4:6] != wanted[4:6] or not np.isclose(found[6], wanted[6], rtol=1e-12, atol=0):
            return [
                f"{label}: row {number} counts {found[4]} tokens at positions of sum {found[5]}, and "
                f"the texts have {wanted[4]} with {wanted[5]}"
            ]
    if len(stored) != len(expected):
        return [f"{label}: {len(stored)} rows where {len(expected)} must be"]
    return []


def _faults_of_values(label: str, rows: pa.Table) -> list[str]:
    """Whether covariances are those of any vectors."""
    for table in as_moments(rows):
        place = f"{label}: layer {table.layer_idx[0]}"
        if (table.products != table.products.transpose(0, 2, 1)).any():
            return [f"{place}: a covariance is not symmetric"]
        variances = np.diagonal(table.products, axis1=1, axis2=2)
        least = -_ROUNDING * np.abs(variances).max(axis=1, initial=0.0, keepdims=True)
        if (variances < least).any():
            return [f"{place}: a variance is negative"]
    return []

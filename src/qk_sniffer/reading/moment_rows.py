"""The rows of a file of moments that somebody asks for, brought together."""

import operator
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.moments import MomentTable, joined
from qk_sniffer.reading.head import Numbers, integers
from qk_sniffer.reading.moments import Moments
from qk_sniffer.reading.places import CapturePlace
from qk_sniffer.storage import as_moments, fault_of_moments, moment_file, moment_schema

_ROWS_AT_ONCE = 32
_NUMBERS = ["layer_idx", "head", "bucket", "pre_rope"]
"""What rows are told apart by."""


def read_moments(
    place: CapturePlace,
    kind: Kind,
    layer: Numbers | None,
    head: Numbers | None,
    bucket: Numbers | None,
    pre_rope: bool,
) -> Moments:
    """Moments of some heads; see ``Captures.moments``."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind}")
    if not isinstance(pre_rope, bool):
        raise UserError(f"pre_rope: expected True or False, got {pre_rope!r}")
    facts = place.manifest.get("moments")
    if not facts:
        raise UserError(f"{place}: no moments were summed; capture with sniffer.moments.enabled: true")
    if kind not in facts:
        there = ", ".join(KINDS[other].plural for other in KINDS if other in facts)
        raise UserError(f"moments: there are none of {KINDS[kind].plural}; choose from {there}")
    wanted = {"layer_idx": layer, "head": head, "bucket": bucket}
    chosen = {column: _integers(column, n) for column, n in wanted.items() if n is not None}
    path = moment_file(kind)
    with place.reading():
        try:
            file = place.table(path, facts[kind]["bytes"])
            _require_columns(file.schema, kind, cross=place.manifest["settings"]["moments"]["cross"])
            table, found = _sum(file, _condition(chosen, pre_rope))
            if not _is_all_there(kind, chosen, pre_rope, found):
                # All that is there is read for the message alone: on the Hub it is in many places.
                _require(kind, chosen, pre_rope, file.to_table(columns=_NUMBERS))
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise UserError(
                f"{place}: {path} can't be read ({first_line(error)}); `qk-sniffer verify` tells which "
                "files of a data root are damaged, and a copy or a new run brings them back"
            ) from error
    assert table is not None
    return Moments.of(table)


def _require_columns(schema: pa.Schema, kind: Kind, *, cross: bool) -> None:
    vector = schema.field("mean").type
    widths = [vector.list_size] if pa.types.is_fixed_size_list(vector) else []
    if not schema.equals(moment_schema(kind, widths, cross=cross)):
        raise ValueError("it has other columns than moments")


def _integers(column: str, numbers: Any) -> list[int]:
    name = column.removesuffix("_idx")
    if not (found := integers(name, numbers)):
        raise UserError(f"{name}: expected integers, got {numbers!r}")
    return sorted(set(found))


def _is_all_there(kind: Kind, chosen: dict[str, list[int]], pre_rope: bool, rows: pa.Table) -> bool:
    try:
        _require(kind, chosen, pre_rope, rows)
    except UserError:
        return False
    return True


def _require(kind: Kind, chosen: dict[str, list[int]], pre_rope: bool, rows: pa.Table) -> None:
    """See that there are moments of what is wanted.

    Args:
        kind: Of the vectors.
        chosen: The wanted layers, heads and buckets, where somebody names some.
        pre_rope: Whether they are wanted before the rotary embedding.
        rows: What the rows of the file are told apart by.

    Raises:
        UserError: A layer, a head, a bucket or the stage is missing.
    """
    plural = KINDS[kind].plural
    rows = rows.filter(pc.field("pre_rope") == pre_rope)
    if not rows.num_rows:
        raise UserError(
            f"moments: there are none of {plural} {'before' if pre_rope else 'after'} RoPE; pass "
            f"pre_rope={not pre_rope}, or capture queries or keys with both by sniffer.moments.pre_rope"
        )
    _require_numbers(plural, "layer", chosen.get("layer_idx", []), rows["layer_idx"])
    for layer in chosen.get("layer_idx", [None]):
        own = rows if layer is None else rows.filter(pc.field("layer_idx") == layer)
        where = plural if layer is None else f"{plural} of layer {layer}"
        _require_numbers(where, "head", chosen.get("head", []), own["head"])
    if "bucket" in chosen and rows["bucket"].null_count:
        raise UserError(
            "moments: bucket: they were summed over all positions; capture with "
            "sniffer.moments.by_bucket: true, or leave bucket out"
        )
    if "head" in chosen:
        rows = rows.filter(pc.field("head").isin(chosen["head"]))
    _require_numbers(plural, "bucket", chosen.get("bucket", []), rows["bucket"])


def _require_numbers(plural: str, what: str, wanted: list[int], there: pa.ChunkedArray) -> None:
    known = sorted(set(there.to_pylist()) - {None})
    for number in wanted:
        if number not in known:
            numbers = ", ".join(map(str, known))
            if len(known) > 2 and known == [*range(known[0], known[-1] + 1)]:
                numbers = f"{known[0]} to {known[-1]}"
            raise UserError(f"moments: the {plural} have no {what} {number}; choose from {numbers}")


def _condition(chosen: dict[str, list[int]], pre_rope: bool) -> ds.Expression:
    conditions = [ds.field(column).isin(numbers) for column, numbers in chosen.items()]
    return reduce(operator.and_, conditions, ds.field("pre_rope") == pre_rope)


def _sum(file: ds.Dataset, condition: ds.Expression) -> tuple[MomentTable | None, pa.Table]:
    """All rows that fulfil a condition, as a table of one, and what they were told apart by.

    Raises:
        ValueError: A value is missing.
    """
    total: MomentTable | None = None
    found = [file.schema.empty_table().select(_NUMBERS)]
    scanner = file.scanner(
        filter=condition, batch_size=_ROWS_AT_ONCE, batch_readahead=1, fragment_readahead=1
    )
    for rows in map(pa.table, scanner.to_batches()):
        if not rows.num_rows:
            continue
        if fault := fault_of_moments(rows):
            raise ValueError(fault)
        found.append(rows.select(_NUMBERS))
        for table in as_moments(rows):
            if total is not None and table.width != total.width:
                raise UserError(
                    f"moments: some vectors have {total.width} coordinates, others {table.width}; name "
                    "layers of one width"
                )
            alike = _as_of_one_head(table)
            total = joined([alike] if total is None else [total, alike])
    return total, pa.concat_tables(found)


def _as_of_one_head(table: MomentTable) -> MomentTable:
    """The same moments, which ``joined`` takes together."""
    numbers: dict[str, Any] = {name: np.zeros_like(table.columns[name]) for name in _NUMBERS}
    return replace(table, **numbers)

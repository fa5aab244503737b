"""The heads that a report looks at closely, with their rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.reading import Captures, Head
from qk_sniffer.report.measures import Measures, measured_rows
from qk_sniffer.storage import parse_head_name

Rows = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Chosen:
    """A head that is looked at closely: a query head with its key head, or one of them alone.

    Attributes:
        name: Of the pair.
        heads: By kind, the chosen one first.
        rows: The rows of each that are measured, as ``Head.numpy`` has them.
        titles: Of each, with its positional R² and what it is chosen for.
        mixed: The values that a query head mixes, and its outputs, where they were captured: their
            heads and rows.
    """

    name: str
    heads: Mapping[Kind, Head]
    rows: Mapping[Kind, Rows]
    titles: Mapping[Kind, str]
    mixed: Mapping[Kind, tuple[Head, Rows]] = field(default_factory=dict)


def head_of(captures: Captures, name: str) -> Head:
    """The head of a name.

    Raises:
        UserError: It is no name of a head, or the head was not captured.
    """
    parsed = parse_head_name(name)
    if parsed is None:
        raise UserError(f"report: {name} is no name of a head; give one such as l02h05q")
    return captures.head(*parsed)


def chosen_heads(
    captures: Captures, measures: Mapping[Kind, Measures], texts: list[int], wanted: Sequence[Head]
) -> list[Chosen]:
    """The heads that somebody wants, or those with the highest, the middle and the lowest R².

    Args:
        captures: The capture.
        measures: What was measured of all heads.
        texts: The texts that it was measured in.
        wanted: The heads, if somebody has named some.
    """
    found = {head.name: (head, "") for head in wanted} or _telling_heads(captures, measures)
    return [_with_partner(captures, measures, texts, *choice) for choice in found.values()]


def _telling_heads(
    captures: Captures, measures: Mapping[Kind, Measures]
) -> dict[str, tuple[Head, str]]:
    """By name: the head, and its place among those that were measured."""
    kind = next(iter(measures))
    norms, r2 = measures[kind].norms, measures[kind].r2
    heads = [head for head in captures.heads if head.kind == kind]
    measured = [head for head in heads if np.isfinite(norms.of(head))] or heads
    ranked = sorted(measured, key=lambda head: -np.nan_to_num(r2.of(head), nan=-np.inf))
    places = {len(ranked) // 2: "middle", len(ranked) - 1: "lowest", 0: "highest"}
    return {
        ranked[i].name: (ranked[i], f"the {places[i]} of the {KINDS[kind].name} heads")
        for i in sorted(places)
    }


def _with_partner(
    captures: Captures, measures: Mapping[Kind, Measures], texts: list[int], head: Head, place: str
) -> Chosen:
    """A query head comes with its key head, where that was captured."""
    heads: dict[Kind, Head] = {head.kind: head}
    told = _told(measures[head.kind].r2.of(head)) + f", {place}" * (place != "")
    titles: dict[Kind, str] = {
        head.kind: f"{KINDS[head.kind].plural.capitalize()} of {head.name} ({told})"
    }
    name = head.name
    served: dict[Kind, Head] = {}
    if head.kind == "q":
        layer_idx, key_head = head.layer.layer_idx, head.layer.key_head(head.head)
        numbers: dict[Kind, int] = {"k": key_head, "v": key_head, "o": head.head}
        served = {
            kind: captures.head(layer_idx, number, kind)
            for kind, number in numbers.items()
            if kind in measures
        }
    if "k" in served:
        key = heads["k"] = served.pop("k")
        told = _told(measures["k"].r2.of(key))
        titles["k"] = f"Keys of {key.name}, which {head.name} meets ({told})"
        name += f" with {key.name}"
    rows = {kind: _rows(one, texts) for kind, one in heads.items()}
    mixed = {kind: (one, _rows(one, texts)) for kind, one in served.items()}
    return Chosen(name, heads, rows, titles, mixed)


def _rows(head: Head, texts: list[int]) -> Rows:
    return measured_rows(head.where(example=texts))[0]


def _told(r2: float) -> str:
    if not np.isfinite(r2):
        return "too few rows or texts for positional R²"
    return f"positional R² {r2:.2f}"

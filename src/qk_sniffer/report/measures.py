"""What is measured in a capture: rows, norms, and how well position is told, by layer and head."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.geometry import positional_r2
from qk_sniffer.kinds import Kind
from qk_sniffer.reading import Captures, Head, finite_rows

ROWS_MEASURED = 16_384
"""Rows of each head that are read, at least where there are as many, of whole texts."""

_MOST_THREADS = 8
"""Each holds the rows of a head."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class HeadMap:
    """A number for each head.

    Attributes:
        layers: (L,) layers, ascending.
        heads: (H,) heads, ascending.
        values: (L, H); NaN where a head was not captured or the number can't be told.
    """

    layers: list[int]
    heads: list[int]
    values: npt.NDArray[np.float64]

    def of(self, head: Head) -> float:
        """The number of a head."""
        return float(self.values[self.layers.index(head.layer.layer_idx), head.head])


@dataclass(frozen=True)
class Measures:
    """What is known of the heads of one kind.

    Attributes:
        n_texts: Texts that norms and R² are taken of.
        buckets: (B,) buckets, ascending.
        rows: (L, B) rows that a head of each layer keeps.
        norms: Mean Euclidean norm of the vectors.
        r2: ``positional_r2``.
        n_left_out: Rows of those texts, of all heads, whose vectors are not finite.
    """

    n_texts: int
    buckets: list[int]
    rows: npt.NDArray[np.int64]
    norms: HeadMap
    r2: HeadMap
    n_left_out: int


def measured_texts(captures: Captures) -> list[int]:
    """The ids of some texts, evenly spread over all, that have enough rows in a head."""
    ids = captures.examples["example_id"].to_pylist()
    rows = max((len(head) for head in captures.heads), default=0)
    wanted = max(2, -(-ROWS_MEASURED * len(ids) // max(1, rows)))
    places = np.linspace(0, len(ids) - 1, min(wanted, len(ids))).round().astype(int)
    return [ids[place] for place in np.unique(places)]


def measure(captures: Captures, texts: list[int], progress: Progress) -> dict[Kind, Measures]:
    """Measure every head, for each kind that was captured.

    Args:
        captures: A capture with at least one text.
        texts: The texts that norms and R² are taken of.
        progress: Wraps the iteration over the heads that are done, given their number.
    """
    heads = captures.heads
    every = len(texts) == captures.examples.num_rows
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        numbers = pool.map(lambda h: _measure_head(h if every else h.where(example=texts)), heads)
        measured = list(zip(heads, progress(numbers, len(heads)), strict=True))
    kinds: dict[Kind, Measures] = {}
    for kind in dict.fromkeys(head.kind for head in heads):
        own = [(head, values) for head, values in measured if head.kind == kind]
        buckets, rows = _rows_by_bucket([head for head, _ in own])
        norms, r2 = (_head_map([(head, v[i]) for head, v in own]) for i in (0, 1))
        n_left_out = sum(values[2] for _, values in own)
        kinds[kind] = Measures(len(texts), buckets, rows, norms, r2, n_left_out)
    return kinds


def measured_rows(head: Head) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """The rows of a head that are measured, and how many others are left out: they are not finite."""
    rows, n_left_out = finite_rows(head)
    # A text that was kept whole may have ten times as many.
    step = max(1, len(rows["vector"]) // (2 * ROWS_MEASURED))
    return {name: values[::step] for name, values in rows.items()}, n_left_out


def _measure_head(head: Head) -> tuple[float, float, int]:
    """Mean norm, positional R², and rows that are not finite."""
    rows, n_left_out = measured_rows(head)
    vectors = rows["vector"]
    if not len(vectors):
        return float("nan"), float("nan"), n_left_out
    norm = float(np.linalg.norm(vectors, axis=1).mean())
    return norm, positional_r2(vectors, rows["position"], rows["example_id"]), n_left_out


def _rows_by_bucket(heads: list[Head]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """All buckets, and the rows of one head of each layer in them: the others have the same."""
    first = {head.layer.layer_idx: head for head in reversed(heads)}
    counts = {}
    for layer in sorted(first):
        column = first[layer].arrow(["bucket"])["bucket"].to_numpy()
        counts[layer] = dict(zip(*np.unique(column, return_counts=True), strict=True))
    buckets = sorted({int(bucket) for found in counts.values() for bucket in found})
    return buckets, np.array([[found.get(b, 0) for b in buckets] for found in counts.values()], int)


def _head_map(values: list[tuple[Head, float]]) -> HeadMap:
    layers = sorted({head.layer.layer_idx for head, _ in values})
    heads = list(range(1 + max(head.head for head, _ in values)))
    grid = np.full((len(layers), len(heads)), np.nan)
    for head, value in values:
        grid[layers.index(head.layer.layer_idx), head.head] = value
    return HeadMap(layers, heads, grid)

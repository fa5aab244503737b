"""What is measured in a capture: rows, norms, and how well position is told, by layer and head."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qk_sniffer.geometry import positional_r2
from qk_sniffer.kinds import LOCAL_POSITIONS, Kind
from qk_sniffer.reading import Captures, Head, HeadMap, SoftmaxMean, finite_rows, softmax_means
from qk_sniffer.storage import has_softmax

ROWS_MEASURED = 16_384
"""Rows of each head that are read, at least where there are as many, of whole texts."""

_MOST_THREADS = 8
"""Each holds the rows of a head."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


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
        softmax: What ``softmax_means`` names; empty where statistics were not captured.
        first_query: The first position of the queries that these are taken of.
    """

    n_texts: int
    buckets: list[int]
    rows: npt.NDArray[np.int64]
    norms: HeadMap
    r2: HeadMap
    n_left_out: int
    softmax: Mapping[str, HeadMap] = field(default_factory=dict)
    first_query: int = 0


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
    means = softmax_means(captures.manifest) if has_softmax(captures.manifest) else {}
    first_query = _first_query(captures, texts)

    def numbers_of(head: Head) -> _Numbers:
        chosen = head if every else head.where(example=texts)
        return _measure_head(chosen, means if head.kind == "q" else {}, first_query)

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        numbers = pool.map(numbers_of, heads)
        measured = list(zip(heads, progress(numbers, len(heads)), strict=True))
    kinds: dict[Kind, Measures] = {}
    for kind in dict.fromkeys(head.kind for head in heads):
        own = [(head, found) for head, found in measured if head.kind == kind]
        buckets, rows = _rows_by_bucket([head for head, _ in own])
        kinds[kind] = Measures(
            n_texts=len(texts),
            buckets=buckets,
            rows=rows,
            norms=HeadMap.of_numbers((head, found.norm) for head, found in own),
            r2=HeadMap.of_numbers((head, found.r2) for head, found in own),
            n_left_out=sum(found.n_left_out for _, found in own),
            softmax={
                name: HeadMap.of_numbers((head, found.softmax[name]) for head, found in own)
                for name in own[0][1].softmax
            },
            first_query=first_query,
        )
    return kinds


def _first_query(captures: Captures, texts: list[int]) -> int:
    """The first position from which on not all keys are local, or 0 where no text is so long."""
    n_local: int = captures.settings["capture"].get("local_positions", LOCAL_POSITIONS)
    examples = captures.examples
    is_measured = pc.is_in(examples["example_id"], pa.array(texts, pa.int32()))
    longest = pc.max(examples.filter(is_measured)["n_tokens"]).as_py()
    return n_local if longest > n_local else 0


def measured_rows(head: Head) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """The rows of a head that are measured, and how many others are left out: they are not finite."""
    rows, n_left_out = finite_rows(head)
    # A text that was kept whole may have ten times as many.
    step = max(1, len(rows["vector"]) // (2 * ROWS_MEASURED))
    return {name: values[::step] for name, values in rows.items()}, n_left_out


@dataclass(frozen=True)
class _Numbers:
    """What is measured of a head: NaN for what has no rows to be told from."""

    norm: float
    r2: float
    n_left_out: int
    softmax: Mapping[str, float]


def _measure_head(head: Head, means: Mapping[str, SoftmaxMean], first_query: int) -> _Numbers:
    """Mean norm, positional R², rows that are not finite, and means of the statistics.

    Args:
        head: The head.
        means: The means that are taken.
        first_query: The first position of the queries that they are taken of.
    """
    rows, n_left_out = measured_rows(head)
    vectors = rows["vector"]
    is_far = rows["position"] >= first_query
    far = {name: values[is_far] for name, values in rows.items() if name != "vector"}
    softmax = {name: mean.of_rows(far) for name, mean in means.items()}
    if not len(vectors):
        return _Numbers(float("nan"), float("nan"), n_left_out, softmax)
    norm = float(np.linalg.norm(vectors, axis=1).mean())
    r2 = positional_r2(vectors, rows["position"], rows["example_id"])
    return _Numbers(norm, r2, n_left_out, softmax)


def _rows_by_bucket(heads: list[Head]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """All buckets, and the rows of one head of each layer in them: the others have the same."""
    first = {head.layer.layer_idx: head for head in reversed(heads)}
    counts = {}
    for layer in sorted(first):
        column = first[layer].arrow(["bucket"])["bucket"].to_numpy()
        counts[layer] = dict(zip(*np.unique(column, return_counts=True), strict=True))
    buckets = sorted({int(bucket) for found in counts.values() for bucket in found})
    return buckets, np.array([[found.get(b, 0) for b in buckets] for found in counts.values()], int)

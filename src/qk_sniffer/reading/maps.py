"""Maps of all heads, by layer and head: a number of each, such as the mean entropy of its softmax."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.kinds import LOCAL_POSITIONS
from qk_sniffer.reading.head import Head


@dataclass(frozen=True)
class HeadMap:
    """A number for each head.

    Attributes:
        layers: (L,) layers, ascending.
        heads: (H,) heads, ascending.
        values: (L, H) float64; NaN where a head was not captured or the number can't be told.
    """

    layers: list[int]
    heads: list[int]
    values: npt.NDArray[np.float64]

    @classmethod
    def of_numbers(cls, numbers: Iterable[tuple[Head, float]]) -> "HeadMap":
        """The map of some heads, at least one, of one kind."""
        return cls.of_places({(head.layer.layer_idx, head.head): number for head, number in numbers})

    @classmethod
    def of_places(cls, found: Mapping[tuple[int, int], float]) -> "HeadMap":
        """The map of some heads, at least one, of one kind, by layer and head."""
        layers = sorted({layer for layer, _ in found})
        heads = list(range(1 + max(head for _, head in found)))
        values = [[found.get((layer, head), np.nan) for head in heads] for layer in layers]
        return cls(layers, heads, np.array(values, np.float64))

    def of(self, head: Head) -> float:
        """The number of a head."""
        return float(self.values[self.layers.index(head.layer.layer_idx), head.head])


Rows = Mapping[str, npt.NDArray[Any]]


def _is_previous(rows: Rows) -> npt.NDArray[Any]:
    """Whether a query attends most to the token before; the first token of a text has none."""
    is_previous: npt.NDArray[Any] = rows["argmax_position"] == rows["position"] - 1
    return is_previous[rows["position"] > 0]


@dataclass(frozen=True)
class SoftmaxMean:
    """What a map shows of the statistics of queries.

    Attributes:
        label: What it is.
        columns: Those that it takes.
        values: Their numbers, some for each query or for most; None takes the one column.
        form: How a mean is written.
        limits: Ends of the colour scale; None takes them, or the upper one, from the means.
    """

    label: str
    columns: tuple[str, ...]
    values: Callable[[Rows], npt.NDArray[Any]] | None = None
    form: str = "{:.2f}"
    limits: tuple[float, float | None] | None = (0.0, 1.0)

    def of_rows(self, rows: Rows) -> float:
        """The mean over the queries of a head that are finite; NaN where there is none.

        Args:
            rows: (N,) each, its columns.
        """
        values = rows[self.columns[0]] if self.values is None else self.values(rows)
        finite = values[np.isfinite(values)]
        return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")


def softmax_means(manifest: Mapping[str, Any]) -> dict[str, SoftmaxMean]:
    """What there is to show of the statistics of a run, by name."""
    n_local = manifest["settings"]["capture"].get("local_positions", LOCAL_POSITIONS)
    has_sinks = any((layer.get("scores") or {}).get("sinks") for layer in manifest["layers"])
    sink = "mean mass on the first token" + " and the learned sink" * has_sinks
    previous = "share attending most to the token before"
    return {
        "entropy": SoftmaxMean("mean entropy, in nats", ("entropy",), limits=(0.0, None)),
        "sink_prob": SoftmaxMean(sink, ("sink_prob",)),
        "local_prob": SoftmaxMean(f"mean mass on the last {n_local:,} positions", ("local_prob",)),
        "max_prob": SoftmaxMean("mean of the largest probability", ("max_prob",)),
        "previous": SoftmaxMean(previous, ("argmax_position", "position"), _is_previous),
        "lse": SoftmaxMean("mean log-sum-exp of the scores", ("lse",), form="{:.1f}", limits=None),
    }

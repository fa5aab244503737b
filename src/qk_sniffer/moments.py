"""Moments of vectors over tokens: counts, means, covariances, and their link to position.

Sums of products are kept about the mean, in float64, and brought together by the formula of T. F. Chan,
G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979, which loses nothing where means are large and differ little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

NO_BUCKET = -(2**31)
"""The bucket of moments over all positions."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MomentTable:
    """Moments of some heads of one kind and width: R rows, one a head, bucket and stage.

    Attributes:
        layer_idx: (R,) int32, layer in the text decoder.
        head: (R,) int32, number of the head among those of its kind in the layer.
        bucket: (R,) int32, of the positions; ``NO_BUCKET`` for all of them.
        pre_rope: (R,) bool, whether the vectors are those before the rotary embedding.
        count: (R,) int64, N, tokens.
        position_sum: (R,) int64, of their positions.
        position_square_sum: (R,) float64, of the squares of these.
        mean: (R, D) float64.
        products: (R, D, D) float64, the sum over tokens of (x - mean) (x - mean)ᵀ.
        position_products: (R, D) float64, the sum of (x - mean) (position - its mean).
        key_mean: (R, D) float64, for queries: of the keys that the head attends to; None for none.
        key_products: (R, D, D) float64, the sum of (x - mean) (key - key_mean)ᵀ at equal positions.
    """

    layer_idx: npt.NDArray[np.int32]
    head: npt.NDArray[np.int32]
    bucket: npt.NDArray[np.int32]
    pre_rope: npt.NDArray[np.bool_]
    count: npt.NDArray[np.int64]
    position_sum: npt.NDArray[np.int64]
    position_square_sum: Floats
    mean: Floats
    products: Floats
    position_products: Floats
    key_mean: Floats | None = None
    key_products: Floats | None = None

    def __len__(self) -> int:
        return len(self.count)

    @property
    def width(self) -> int:
        """D."""
        return int(self.mean.shape[1])

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What it has, by name."""
        every = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: column for name, column in every if column is not None}

    def select(self, rows: Any) -> "MomentTable":
        """Some rows, by their numbers or by whether each is wanted."""
        return replace(self, **{name: column[rows] for name, column in self.columns.items()})

    @property
    def position_mean(self) -> Floats:
        """(R,)."""
        return self.position_sum / self.count

    @classmethod
    def concatenated(cls, tables: "Sequence[MomentTable]") -> "MomentTable":
        """The rows of several tables, at least one, with the same columns."""
        names = tables[0].columns
        return cls(**{name: np.concatenate([t.columns[name] for t in tables]) for name in names})

    def summed(self, groups: npt.NDArray[np.int64]) -> "MomentTable":
        """Bring rows together, as moments of all their tokens.

        Args:
            groups: (R,) numbers; rows of one number become one, and the result ascends in them.

        Returns:
            The table, where each row has layer, head, bucket and stage of the first that it holds.
        """
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.diff(groups[order], prepend=groups.min(initial=0) - 1))
        if len(starts) == len(self):
            return self.select(order)
        rows = self.select(order)
        return _Sums(rows, starts).table()


class _Sums:
    """Sums over neighbouring rows of a table.

    Args:
        rows: The table.
        starts: (G,) the first row of each group.
    """

    def __init__(self, rows: MomentTable, starts: npt.NDArray[np.int64]) -> None:
        self._rows, self._starts = rows, starts
        sizes = np.diff(starts, append=len(rows))
        self._group = np.repeat(np.arange(len(starts)), sizes)
        self._count = np.add.reduceat(rows.count, starts)

    def table(self) -> MomentTable:
        """A row for each group."""
        rows, count = self._rows, self._count
        mean, off = self._centred(rows.mean)
        position_sum = np.add.reduceat(rows.position_sum, self._starts)
        positions_off = rows.position_mean - (position_sum / count)[self._group]
        key: dict[str, Any] = {}
        if rows.key_mean is not None and rows.key_products is not None:
            key["key_mean"], keys_off = self._centred(rows.key_mean)
            key["key_products"] = self._products(rows.key_products, off, keys_off)
        firsts = rows.select(self._starts)
        return replace(
            firsts,
            count=count,
            position_sum=position_sum,
            position_square_sum=np.add.reduceat(rows.position_square_sum, self._starts),
            mean=mean,
            products=self._products(rows.products, off, off),
            position_products=self._products(
                rows.position_products[..., None], off, positions_off[:, None]
            )[..., 0],
            **key,
        )

    def _centred(self, means: Floats) -> tuple[Floats, Floats]:
        """The mean of each group, and how far each row's is from it."""
        # About one of them, so that nothing is lost where they differ little.
        reference = means[self._starts]
        steps = means - reference[self._group]
        weighted = np.add.reduceat(steps * self._rows.count[:, None], self._starts, axis=0)
        mean = weighted / self._count[:, None]
        return reference + mean, steps - mean[self._group]

    def _products(self, products: Floats, left: Floats, right: Floats) -> Floats:
        """Sums of products about the means of the groups."""
        weighted = left * self._rows.count[:, None]
        out = np.empty((len(self._starts), *products.shape[1:]))
        stops = [*self._starts[1:], len(products)]
        for number, (start, stop) in enumerate(zip(self._starts, stops, strict=True)):
            # Row by row, since all of them at once would take their memory again.
            out[number] = products[start]
            for row in range(start + 1, stop):
                out[number] += products[row]
            out[number] += weighted[start:stop].T @ right[start:stop]
        return out


def joined(tables: Sequence[MomentTable]) -> MomentTable:
    """Moments of the tokens of several tables, of one kind and width, by layer, head, bucket and stage.

    Args:
        tables: At least one.
    """
    together = MomentTable.concatenated(tables)
    keys = [together.bucket, together.pre_rope, together.head, together.layer_idx]
    order = np.lexsort(keys)
    changes = np.zeros(len(order), np.int64)
    for key in keys:
        changes[1:] |= np.diff(key[order].astype(np.int64)) != 0
    groups = np.empty(len(order), np.int64)
    groups[order] = changes.cumsum()
    return together.summed(groups)


@dataclass(frozen=True)
class MomentState:
    """Moments of some texts.

    Attributes:
        tables: By kind (q, k, v, o); those of a kind differ in width.
        example_ids: (E,) int32, ascending: the texts.
    """

    tables: dict[Any, list[MomentTable]]
    example_ids: npt.NDArray[np.int32]

    @property
    def n_bytes(self) -> int:
        """Memory of the tables."""
        tables = chain.from_iterable(self.tables.values())
        return sum(column.nbytes for table in tables for column in table.columns.values())

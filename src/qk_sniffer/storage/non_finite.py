"""Rows with an infinity or a NaN: counted while a head's file is written, or in one that is there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.storage.schema import parse_head_name


@dataclass
class NonFinite:
    """The rows of one head whose vectors are not finite.

    Attributes:
        rows: How many there are.
        example_ids: (E,) int32, ascending: the texts that they are of.
    """

    rows: int = 0
    example_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def count(self, example_ids: Any, pieces: Iterable[npt.NDArray[np.float32]]) -> None:
        """Count those among some rows.

        Args:
            example_ids: An Arrow column of int32, one for each row.
            pieces: (n, head_dim) arrays, together the vectors of the rows.
        """
        first = 0
        for piece in pieces:
            # A sum is finite only where each term is, and makes no array of its own.
            with np.errstate(all="ignore"):
                is_suspect = not np.isfinite(piece.sum())
            if is_suspect and (found := np.flatnonzero(~np.isfinite(piece).all(axis=1))).size:
                self.rows += found.size
                ids = example_ids.to_numpy()[first + found]
                self.example_ids = np.union1d(self.example_ids, ids)
            first += len(piece)


def non_finite_field(
    heads: Mapping[str, Mapping[str, Any]], example_ids: Sequence[npt.NDArray[np.int32]]
) -> dict[str, Any]:
    """What a manifest says of all heads together; empty where every row is finite.

    Args:
        heads: What it says of each head.
        example_ids: The texts that some of the heads have such rows of.
    """
    rows = {name: facts["non_finite"] for name, facts in heads.items() if "non_finite" in facts}
    if not rows:
        return {}
    layers = {parsed[0] for name in rows if (parsed := parse_head_name(name))}
    texts = np.unique(np.concatenate(example_ids)).size
    return {"non_finite": {"rows": sum(rows.values()), "texts": texts, "layers": sorted(layers)}}

"""Moments in float64 NumPy, of rows that were all kept."""

from collections.abc import Iterable
from typing import Any

import numpy as np

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

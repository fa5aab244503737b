"""Where position shows in the vectors of a head: principal components and a predictor of position."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_FOLDS = 5
_RIDGE = 1e-3


def principal_components(vectors: npt.ArrayLike, count: int = 2) -> tuple[Array, Array]:
    """Coordinates of vectors along the directions in which they vary most.

    Args:
        vectors: (N, D), N > 1.
        count: Number of components, C, at most D.

    Returns:
        (N, C) coordinates, centred, and (C,) shares of the whole variance. The sign of a component is
        such that its largest loading is positive.
    """
    centred = np.asarray(vectors, np.float64)
    centred = centred - centred.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T @ centred)
    values, axes = values[::-1].clip(min=0), axes[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return centred @ axes, values[:count] / max(values.sum(), np.finfo(np.float64).tiny)


def positional_r2(
    vectors: npt.ArrayLike, positions: npt.ArrayLike, example_ids: npt.ArrayLike
) -> float:
    """How well a linear map of the vectors tells the position of tokens in texts that it has not seen.

    Ridge regression is fitted on four fifths of the texts and predicts the positions in the last, for
    each fifth in turn; R² = 1 - Σ(p - p̂)² / Σ(p - p̄)², with p̄ the mean position of the texts that the
    prediction was fitted on. The penalty of a squared weight is a thousandth of the mean over the
    coordinates of their squared deviations' sum.

    Args:
        vectors: (N, D) queries or keys of one head.
        positions: (N,) token positions.
        example_ids: (N,) texts.

    Returns:
        1 where position is told exactly, 0 or less where nothing is told of it; NaN with fewer than
        two texts, no more rows than coordinates, or one position for all.
    """
    x, y = np.asarray(vectors, np.float64), np.asarray(positions, np.float64)
    texts, owner = np.unique(np.asarray(example_ids), return_inverse=True)
    if len(texts) < 2 or len(x) <= x.shape[1]:
        return float("nan")
    fold = owner % min(_FOLDS, len(texts))
    residual = total = 0.0
    for number in range(fold.max() + 1):
        seen, held_out = fold != number, fold == number
        predicted, mean = _ridge(x[seen], y[seen], x[held_out])
        residual += float(((y[held_out] - predicted) ** 2).sum())
        total += float(((y[held_out] - mean) ** 2).sum())
    return 1 - residual / total if total else float("nan")


def _ridge(x: Array, y: Array, new: Array) -> tuple[Array, float]:
    """Predictions for ``new``, and the mean of ``y``."""
    centre, mean = x.mean(axis=0), float(y.mean())
    centred = x - centre
    covariance = centred.T @ centred
    penalty = _RIDGE * np.trace(covariance) / len(covariance) + np.finfo(np.float64).tiny
    weights = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), centred.T @ (y - mean))
    return (new - centre) @ weights + mean, mean

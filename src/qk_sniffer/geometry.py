"""Where position shows in the vectors of a head: principal components and a predictor of position."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_FOLDS = 5
_RIDGE = 1e-3
_LEAST_R2 = 0.5
"""Of position and a coordinate, for that coordinate to carry position."""
_LEAST_COHERENCE = 0.5
"""Of the angle and the phase of position, for points to turn with position."""
_MOST_SPREAD = 0.5
"""Standard deviation of the radius over its mean; 0.52 in a cloud of normal noise, 0 on a circle."""
_LEAST_TURNS = 2
"""In the range of positions: points that turn less may just drift."""
_FINENESS = 8
"""Frequencies of the periodogram for each turn in the range of positions."""


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
    values, axes = principal_axes(centred.T @ centred, count)
    return centred @ axes, values[:count] / max(values.sum(), np.finfo(np.float64).tiny)


def principal_axes(covariance: Array, count: int) -> tuple[Array, Array]:
    """The directions in which vectors vary most.

    Args:
        covariance: (D, D) of the vectors, or a multiple of it.
        count: Number of directions, C, at most D.

    Returns:
        (D,) variances, descending, in the units of ``covariance``, and (D, C) directions, a column for
        each. The sign of a direction is such that its largest loading is positive.
    """
    values, axes = np.linalg.eigh(covariance)
    values, axes = values[::-1].clip(min=0), axes[:, ::-1][:, :count]
    return values, axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])


@dataclass(frozen=True)
class TellingComponents:
    """Two principal components of a head's vectors, chosen for what they show of position.

    Attributes:
        numbers: Of the two components, from 1.
        coordinates: (N, 2), centred.
        shares: (2,) of the whole variance.
        r2: Squared correlation of position with the first coordinate.
        period: Positions in which the points turn once around a ring; None where they form no ring.
    """

    numbers: tuple[int, int]
    coordinates: Array
    shares: Array
    r2: float
    period: float | None = None

    @property
    def is_line(self) -> bool:
        """Whether the first coordinate carries position."""
        return self.period is None and self.r2 >= _LEAST_R2


def telling_components(
    vectors: npt.ArrayLike, positions: npt.ArrayLike, count: int = 8
) -> TellingComponents:
    """The pair of components that shows most of position, among the first ones.

    A component whose coordinate carries position comes with the one that carries it next best.
    Otherwise a pair that forms a ring, along which the points turn with position; otherwise the first
    two components.

    Args:
        vectors: (N, D), N > 1 and D > 1.
        positions: (N,) token positions.
        count: Components to choose from.
    """
    points, shares = principal_components(vectors, count)
    places = np.asarray(positions, np.int64)
    r2 = np.array([_squared_correlation(column, places) for column in points.T])
    order = np.argsort(-r2, kind="stable")
    period: float | None = None
    if r2[order[0]] >= _LEAST_R2:
        first, second = int(order[0]), int(order[1])
    elif (ring := _ring(points, places)) is not None:
        first, second, period = ring
    else:
        first, second = 0, 1
    pair = [first, second]
    return TellingComponents(
        (first + 1, second + 1), points[:, pair], shares[pair], float(r2[first]), period
    )


def _squared_correlation(values: Array, positions: npt.NDArray[np.int64]) -> float:
    spread = values.std() * positions.std()
    if not spread:
        return 0.0
    covariance = ((values - values.mean()) * (positions - positions.mean())).mean()
    return float((covariance / spread) ** 2)


def _ring(points: Array, positions: npt.NDArray[np.int64]) -> tuple[int, int, float] | None:
    """The pair of components, from 0, whose points turn most steadily on a ring, and its period."""
    scaled = points / points.std(axis=0).clip(min=np.finfo(np.float64).tiny)
    found = []
    for first, second in combinations(range(points.shape[1]), 2):
        plane = scaled[:, first] + 1j * scaled[:, second]
        radius = np.abs(plane)
        if radius.std() <= _MOST_SPREAD * radius.mean():
            coherence, period = _rotation(np.angle(plane), positions)
            found.append((coherence, first, second, period))
    best = max(found, default=(0.0, 0, 0, 0.0))
    return best[1:] if best[0] >= _LEAST_COHERENCE else None


def _rotation(angles: Array, positions: npt.NDArray[np.int64]) -> tuple[float, float]:
    """How steadily angles turn with position, and the positions of one turn.

    The periodogram is C(f) = |1/N Σ exp(i(angle - 2πfp))|, with f in either direction.

    Returns:
        The largest C, and 1/|f| there; zeros where that turns less than twice in the range of
        positions, or where chance reaches it: in noise the largest of M values of C² is some ln(M)/N.
        Source: K. V. Mardia, P. E. Jupp, "Directional Statistics", 2000, 6.3.
    """
    offsets = positions - positions.min()
    span = int(offsets.max()) + 1
    sums = [np.bincount(offsets, wave(angles), span) for wave in (np.cos, np.sin)]
    size = _FINENESS * span
    coherence = np.abs(np.fft.fft(sums[0] + 1j * sums[1], size)) / len(angles)
    best = int(coherence.argmax())
    frequency, found = abs(float(np.fft.fftfreq(size)[best])), float(coherence[best])
    if frequency < _LEAST_TURNS / span or found**2 < 2 * np.log(size) / len(angles):
        return 0.0, 0.0
    return found, 1 / frequency


def means_along(
    positions: npt.ArrayLike, values: npt.ArrayLike, per_octave: int = 3
) -> tuple[Array, Array]:
    """Means of values in bins of position that widen with it; the first few hold one position each.

    Args:
        positions: (N,) integers from 0: positions, or distances.
        values: (N,).
        per_octave: Bins while position + 1 doubles.

    Returns:
        (B,) mean position and (B,) mean value of each bin that is not empty.
    """
    places = np.asarray(positions, np.float64)
    bins = np.floor(per_octave * np.log2(places + 1)).astype(np.int64)
    _, owner, counts = np.unique(bins, return_inverse=True, return_counts=True)
    sums = [np.bincount(owner, v) for v in (places, np.asarray(values, np.float64))]
    return sums[0] / counts, sums[1] / counts


def pair_norms(vectors: npt.ArrayLike) -> Array:
    """Mean norm of each pair of coordinates i and i + D/2, which RoPE turns together in Llama.

    Args:
        vectors: (N, D), D even.

    Returns:
        (D/2,).
    """
    halves = np.stack(np.split(np.asarray(vectors, np.float64), 2, axis=1))
    return np.asarray(np.hypot(*halves).mean(axis=0))


def predicted_positions(
    vectors: npt.ArrayLike, positions: npt.ArrayLike, example_ids: npt.ArrayLike
) -> Array:
    """The position of each token as ``positional_r2`` predicts it from texts that it has not seen.

    Args:
        vectors: (N, D) queries or keys of one head.
        positions: (N,) token positions.
        example_ids: (N,) texts.

    Returns:
        (N,); NaN with fewer than two texts or no more rows than coordinates.
    """
    return _predicted(vectors, positions, example_ids)[0]


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
    predicted, means = _predicted(vectors, positions, example_ids)
    y = np.asarray(positions, np.float64)
    total = float(((y - means) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / total if total else float("nan")


def _predicted(
    vectors: npt.ArrayLike, positions: npt.ArrayLike, example_ids: npt.ArrayLike
) -> tuple[Array, Array]:
    """(N,) predictions, and (N,) means of the positions that they were fitted on."""
    x, y = np.asarray(vectors, np.float64), np.asarray(positions, np.float64)
    texts, owner = np.unique(np.asarray(example_ids), return_inverse=True)
    predicted, means = np.full((2, len(x)), np.nan)
    if len(texts) < 2 or len(x) <= x.shape[1]:
        return predicted, means
    fold = owner % min(_FOLDS, len(texts))
    for number in range(fold.max() + 1):
        seen, held_out = fold != number, fold == number
        predicted[held_out], means[held_out] = _ridge(x[seen], y[seen], x[held_out])
    return predicted, means


def _ridge(x: Array, y: Array, new: Array) -> tuple[Array, float]:
    """Predictions for ``new``, and the mean of ``y``."""
    centre, mean = x.mean(axis=0), float(y.mean())
    centred = x - centre
    weights = ridge_weights(centred.T @ centred, centred.T @ (y - mean))
    return (new - centre) @ weights + mean, mean


def ridge_weights(covariance: Array, position_covariance: Array) -> Array:
    """The linear map that ``positional_r2`` fits.

    Args:
        covariance: (D, D) of the vectors, or a multiple of it.
        position_covariance: (D,) of vectors and position, in the same multiple.

    Returns:
        (D,) weights of the centred coordinates.
    """
    penalty = _RIDGE * np.trace(covariance) / len(covariance) + np.finfo(np.float64).tiny
    weights: Array = np.linalg.solve(
        covariance + penalty * np.eye(len(covariance)), position_covariance
    )
    return weights

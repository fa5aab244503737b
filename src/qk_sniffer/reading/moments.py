"""Moments of some heads: means, covariances and what they tell of position, and how two runs differ."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.geometry import principal_axes, ridge_weights
from qk_sniffer.moments import MomentTable

Floats = npt.NDArray[np.float64]


class Components(NamedTuple):
    """Principal components.

    Attributes:
        variances: (D,) along each, descending.
        directions: (D, D), a column of length 1 for each; its largest loading is positive.
    """

    variances: Floats
    directions: Floats


class MomentDifference(NamedTuple):
    """How moments differ from others.

    Attributes:
        mean_shift: (D,) difference of the means, in units of the deviation: the root of the mean of
            both variances.
        covariance_distance: Norm of the difference of the covariances, over that of the other one;
            Frobenius norms.
        divergence: Sum of both Kullback-Leibler divergences of normal distributions with these
            moments, in nats; infinite where a covariance is singular.
    """

    mean_shift: Floats
    covariance_distance: float
    divergence: float


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Moments of vectors of D coordinates over tokens, in float64.

    Attributes:
        count: N, vectors: tokens, times heads where several are taken together.
        mean: (D,).
        covariance: (D, D), divided by N.
        position_mean: Of the positions of the tokens in their texts.
        position_variance: Of these, divided by N.
        position_covariance: (D,) covariance of each coordinate with position, divided by N.
        key_mean: (D,) of queries, where the run has it: mean of the keys of the head that they attend
            to, at the same positions.
        key_covariance: (D, D) covariance of the queries' coordinates with those of these keys, divided
            by N: a row for each coordinate of the query.
    """

    count: int
    mean: Floats
    covariance: Floats
    position_mean: float
    position_variance: float
    position_covariance: Floats
    key_mean: Floats | None = None
    key_covariance: Floats | None = None

    @classmethod
    def of(cls, table: MomentTable) -> "Moments":
        """The moments in a table of one row."""
        count = int(table.count[0])
        position_mean = float(table.position_mean[0])
        has_keys = table.key_mean is not None and table.key_products is not None
        return cls(
            count,
            table.mean[0],
            table.products[0] / count,
            position_mean,
            max(0.0, float(table.position_square_sum[0]) / count - position_mean**2),
            table.position_products[0] / count,
            table.key_mean[0] if table.key_mean is not None and has_keys else None,
            table.key_products[0] / count if table.key_products is not None and has_keys else None,
        )

    def __repr__(self) -> str:
        return f"<Moments of {self.count:,} vectors of {self.width} coordinates>"

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def variance(self) -> Floats:
        """(D,) of each coordinate, divided by N."""
        return self.covariance.diagonal().copy()

    def components(self) -> Components:
        """The principal components of the vectors.

        Raises:
            numpy.linalg.LinAlgError: The moments are not finite.
        """
        return Components(*principal_axes(self.covariance, self.width))

    @property
    def positional_slope(self) -> Floats:
        """(D,) change of the vectors from one position to the next, by least squares."""
        slope: Floats = self.position_covariance / (self.position_variance or np.nan)
        return slope

    @property
    def positional_share(self) -> float:
        """The share of the vectors' whole variance that a straight line in position explains."""
        explained = float(self.position_covariance @ self.positional_slope)
        whole = float(np.trace(self.covariance))
        return explained / whole if whole else float("nan")

    def positional_shares(self, directions: npt.ArrayLike | None = None) -> Floats:
        """The share of the variance along some directions that a straight line in position explains.

        That is the squared correlation of position with the vectors' coordinate along a direction.

        Args:
            directions: (D, C), a column for each, of any length; None takes the coordinates.

        Returns:
            (C,) from 0 to 1; NaN along a direction without variance.
        """
        along = np.eye(self.width) if directions is None else np.asarray(directions, np.float64)
        whole = ((self.covariance @ along) * along).sum(axis=0)
        explained = (self.position_covariance @ along) * (self.positional_slope @ along)
        shares: Floats = np.full(len(whole), np.nan)
        np.divide(explained, whole, out=shares, where=whole > 0)
        return shares

    def positional_r2(self, on: "Moments | None" = None) -> float:
        """How well a linear map of the vectors tells the position of tokens.

        It is the map of ``geometry.positional_r2``, fitted on all tokens of these moments and measured
        on the same tokens, or on those of others: R² = 1 - mean (p - p̂)² / mean (p - p̄)², with p̄ the
        mean position of the tokens that the map was fitted on. Measured on texts that it has seen, a
        map looks better than it is; with many more tokens than coordinates, by little.

        Args:
            on: The moments of the tokens that it is measured on, such as those of other texts; None
                takes these.

        Returns:
            1 where position is told exactly, 0 or less where nothing is told of it; NaN with no more
            tokens than coordinates, one position for all, or vectors that are not finite.
        """
        other = self if on is None else on
        if self.count <= self.width or not np.isfinite(self.covariance).all():
            return float("nan")
        weights = ridge_weights(self.covariance, self.position_covariance)
        between = other.position_mean - self.position_mean
        bias = between - float(weights @ (other.mean - self.mean))
        spread = float(weights @ other.covariance @ weights - 2 * weights @ other.position_covariance)
        error = other.position_variance + spread + bias**2
        total = other.position_variance + between**2
        return 1 - error / total if total else float("nan")

    def compared_with(self, other: "Moments") -> MomentDifference:
        """How these moments differ from others, of vectors as wide.

        Args:
            other: Those that are the measure, such as the same head of another run.
        """
        shift = self.mean - other.mean
        deviation = np.sqrt((self.variance + other.variance) / 2)
        distance = np.linalg.norm(self.covariance - other.covariance)
        return MomentDifference(
            np.divide(shift, deviation, out=np.zeros_like(shift), where=deviation > 0),
            float(distance / max(np.linalg.norm(other.covariance), np.finfo(np.float64).tiny)),
            self._divergence(other),
        )

    def torch(self) -> dict[str, Tensor]:
        """The attributes as tensors, by their names: float64, but ``count``, an int64."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return {
            name: torch.tensor(value, dtype=torch.int64 if name == "count" else torch.float64)
            for name, value in found.items()
        }

    def _divergence(self, other: "Moments") -> float:
        """½ tr(A⁻¹B + B⁻¹A) - D + ½ δᵀ(A⁻¹ + B⁻¹)δ."""
        shift, total = self.mean - other.mean, -float(self.width)
        if min(self.count, other.count) <= self.width:
            return float("inf")
        for own, others in ((self.covariance, other.covariance), (other.covariance, self.covariance)):
            try:
                np.linalg.cholesky(own)
            except np.linalg.LinAlgError:
                return float("inf")
            total += float(np.trace(np.linalg.solve(own, others + np.outer(shift, shift)))) / 2
        return total

"""What ``geometry`` finds in vectors that are made for it: lines, rings and noise."""

import numpy as np
import numpy.typing as npt
import pytest

from qk_sniffer.geometry import (
    means_along,
    pair_norms,
    positional_r2,
    predicted_positions,
    principal_components,
    telling_components,
)

POSITIONS = np.tile(np.arange(400), 4)
SCALES = np.array([6, 5, 4, 3, 1, 1, 0.5, 0.5, 0.1, 0.1])


def noise(seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(len(POSITIONS), len(SCALES))) * SCALES


def ring(period: float, direction: int = 1, start: int = 0) -> npt.NDArray[np.float64]:
    angle = 2 * np.pi * direction * (POSITIONS + start) / period
    vectors = noise()
    for column, wave in ((2, np.cos), (3, np.sin)):
        vectors[:, column] = 4 * wave(angle) + 0.3 * vectors[:, column]
    return vectors


def test_a_line_is_drawn_along_the_component_that_carries_position() -> None:
    vectors = noise()
    vectors[:, 2] = (POSITIONS - 200) / 30
    vectors[:, 4] = vectors[:, 4] + (POSITIONS - 200) / 300
    found = telling_components(vectors, POSITIONS)
    assert found.is_line and found.period is None
    assert found.r2 > 0.9
    points, shares = principal_components(vectors, 8)
    first, second = (number - 1 for number in found.numbers)
    carried = [np.corrcoef(column, POSITIONS)[0, 1] ** 2 for column in points.T]
    assert np.argsort(carried)[::-1][:2].tolist() == [first, second]
    np.testing.assert_array_equal(found.coordinates, points[:, [first, second]])
    np.testing.assert_array_equal(found.shares, shares[[first, second]])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("period", [2 * np.pi, 17.5, 131.0])
def test_a_ring_is_drawn_with_its_period(period: float, direction: int) -> None:
    found = telling_components(ring(period, direction), POSITIONS + 50)
    assert found.period == pytest.approx(period, rel=0.02)
    assert not found.is_line
    radius = np.linalg.norm(found.coordinates, axis=1)
    assert radius.std() < 0.3 * radius.mean()


def test_points_that_turn_less_than_twice_may_just_drift() -> None:
    found = telling_components(ring(320), POSITIONS)
    assert (found.numbers, found.period) == ((1, 2), None)


def test_noise_is_drawn_along_the_first_two_components() -> None:
    for seed in range(5):
        found = telling_components(noise(seed), POSITIONS)
        assert (found.numbers, found.period, found.is_line) == ((1, 2), None, False)
        few = telling_components(noise(seed)[:30], POSITIONS[:30] * 997)
        assert few.period is None, "of many frequencies one always fits a few points"


def test_a_ring_whose_angle_has_no_part_in_position_is_noise() -> None:
    angle = np.random.default_rng(3).uniform(0, 2 * np.pi, len(POSITIONS))
    vectors = 0.1 * noise()
    vectors[:, 0], vectors[:, 1] = 4 * np.cos(angle), 4 * np.sin(angle)
    assert telling_components(vectors, POSITIONS).period is None


def test_points_of_any_radius_are_no_ring() -> None:
    vectors = ring(17.5)
    vectors[:, 2:4] *= np.random.default_rng(4).exponential(size=(len(POSITIONS), 1))
    assert telling_components(vectors, POSITIONS).period is None


def test_constant_vectors_and_one_position_are_noise() -> None:
    for vectors, positions in ((np.ones((9, 4)), POSITIONS[:9]), (noise(), 0 * POSITIONS)):
        found = telling_components(vectors, positions)
        assert (found.numbers, found.period, found.r2) == ((1, 2), None, 0)


def test_predictions_are_those_of_positional_r2() -> None:
    texts = np.repeat(np.arange(4), 400)
    vectors = noise()
    vectors[:, 1] += POSITIONS / 40
    predicted = predicted_positions(vectors, POSITIONS, texts)
    residual = ((POSITIONS - predicted) ** 2).sum()
    total = ((POSITIONS - POSITIONS.mean()) ** 2).sum()
    assert positional_r2(vectors, POSITIONS, texts) == pytest.approx(1 - residual / total)
    # A text's own rows have no part in its predictions.
    changed = np.where(texts == 1, 0, POSITIONS)
    again = predicted_positions(vectors, changed, texts)
    np.testing.assert_array_equal(again[texts == 1], predicted[texts == 1])
    assert np.isnan(predicted_positions(vectors[:400], POSITIONS[:400], texts[:400])).all()


def test_means_along_position() -> None:
    positions = np.array([0, 0, 1, 2, 102, 104, 2000])
    places, means = means_along(positions, [1, 3, 5, 7, 8, 10, 4])
    np.testing.assert_array_equal(places, [0, 1, 2, 103, 2000])
    np.testing.assert_array_equal(means, [2, 5, 7, 9, 4])


def test_norms_of_pairs_of_coordinates() -> None:
    vectors = np.array([[3, 0, 1, 4, 2, 0], [0, 0, 1, 0, 2, 0]])
    np.testing.assert_allclose(pair_norms(vectors), [2.5, 2, 1])

"""Precision and recall: against brute force, in any block size, with equal images and wide offsets; bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sign_fast.errors import SignFastError
from sign_fast.metrics import precision_recall


def features(seed, count, dim=4, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((count, dim)) + shift).astype(np.float32)


def brute_force(x, y, k=3):
    """Kynkäänniemi et al. 2019, eq. 1 and 2, by differences."""

    def distances(a, b):
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(2))

    def share(of, manifold):
        radii = np.sort(distances(manifold, manifold), axis=1)[:, k]
        return (distances(of, manifold) <= radii).any(1).mean()

    return share(x, y), share(y, x)


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_equals_brute_force(block, shift):
    x, y = features(0, 120, shift=shift), features(1, 90)
    found = precision_recall(x, y, block=block)
    assert found == pytest.approx(brute_force(x, y))
    assert (0 < found.precision < 1) == (shift < 30)
    assert precision_recall(y, x, block=block) == found[::-1]


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_neighbours(neighbours):
    x, y = features(0, 60, shift=0.8), features(1, 50)
    assert precision_recall(x, y, neighbours=neighbours) == pytest.approx(brute_force(x, y, neighbours))


@pytest.mark.parametrize("dim", [5, 67])
def test_equal_images_are_at_distance_zero(dim):
    """Balls of radius 0, which rounding of ‖x‖² + ‖y‖² − 2x·y would leave empty."""
    x = features(0, 40, dim) + 1000
    y = np.repeat(x, 4, axis=0)  # an image, its copy and two more
    assert brute_force(x, y) == (1, 1)
    assert precision_recall(x, y, block=7) == precision_recall(x, y, block=13) == (1, 1)
    x = y
    assert precision_recall(x + np.float32(1e-3), y) == (0, 0)  # next to them is not in them


def test_far_from_the_origin():
    """Distances far below the features' size: float32 products would drown them."""
    x, y = features(0, 80) + 10000, features(1, 80, shift=0.5) + 10000
    assert precision_recall(x, y) == pytest.approx(brute_force(x, y))


def test_half_precision_features_are_taken_as_they_are():
    x, y = features(0, 60).astype(np.float16), features(1, 60, shift=0.5).astype(np.float16)
    assert precision_recall(x, y) == pytest.approx(brute_force(x, y))
    assert precision_recall(torch.from_numpy(x), torch.from_numpy(y)) == precision_recall(x, y)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (features(0, 3), features(1, 9), "need at least 4 images, not 3 and 9"),
        (features(0, 9), features(1, 9, dim=5), "reference must be"),
        (features(0, 9), features(1, 9) * np.float32("inf"), "not finite"),
        (features(0, 9)[0], features(1, 9), "must be"),
    ],
    ids=["few", "widths", "inf", "rank"],
)
def test_what_does_not_fit(x, y, message):
    with pytest.raises(SignFastError, match=message):
        precision_recall(x, y)

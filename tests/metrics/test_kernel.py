"""Kernel distance: against sums written out, unbiased, the same whatever the arrays are; bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sign_fast.errors import SignFastError
from sign_fast.metrics import kernel_distance
from sign_fast.metrics.kernel import squared_mmd


def features(seed, count, dim=6, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((count, dim)) + shift).astype(np.float32)


def by_sums(x, y):
    """Bińkowski et al. 2018, eq. 4, term by term."""
    m, d = x.shape

    def k(a, b):
        return (float(a @ b) / d + 1) ** 3

    x, y = x.astype(np.float64), y.astype(np.float64)
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    between = sum(k(a, b) for a in x for b in y)
    return within / (m * (m - 1)) - 2 * between / m**2


def test_equals_the_sums():
    x, y = features(0, 20), features(1, 20, shift=0.5)
    want = by_sums(x, y)
    assert float(squared_mmd(*(torch.from_numpy(a).double() for a in (x, y)))) == pytest.approx(want, rel=1e-12)
    whole = kernel_distance(x, y, subsets=3)  # all images are in every subset
    assert whole.mean == pytest.approx(want, rel=1e-12) and whole.std == pytest.approx(0, abs=1e-12)


def test_subsets_are_drawn_without_replacement_by_the_seed():
    x, y = features(0, 30), features(1, 40)
    found = kernel_distance(x, y, subsets=4, subset_size=10, seed=7)
    draws = np.random.default_rng(7)
    values = [by_sums(x[draws.choice(30, 10, replace=False)], y[draws.choice(40, 10, replace=False)]) for _ in range(4)]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-12)
    assert kernel_distance(x, y, subsets=4, subset_size=10, seed=8) != found
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=4, subset_size=10, seed=7) == found


def test_unbiased():
    """Two samples of one law are at distance 0 on average; it is below 0 about as often as above."""
    found = [kernel_distance(features(2 * i, 50), features(2 * i + 1, 50), subsets=1).mean for i in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(200)
    assert 40 < sum(value < 0 for value in found) < 160
    apart = kernel_distance(features(0, 50), features(1, 50, shift=1.0), subsets=1).mean
    assert apart > 10 * np.std(found)


@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (features(0, 30), features(1, 9), {"subset_size": 10}, "a subset of 10 images is more than there are"),
        (features(0, 1), features(1, 9), {}, "subsets of at least 2 images"),
        (features(0, 30), features(1, 30), {"subsets": 0}, "not 0 of 30"),
        (features(0, 30), features(1, 30, dim=5), {}, "reference must be"),
        (features(0, 30) * np.float32("nan"), features(1, 30), {}, "not finite"),
        (np.zeros((3, 3), np.int64), features(1, 30, dim=3), {}, "must be"),
    ],
    ids=["few", "one", "none", "widths", "nan", "integers"],
)
def test_what_does_not_fit(x, y, options, message):
    with pytest.raises(SignFastError, match=message):
        kernel_distance(x, y, **options)

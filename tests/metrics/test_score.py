"""Inception score: the formula, known cases, streamed in any batches; bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sign_fast.errors import SignFastError
from sign_fast.metrics import ScoreSums, inception_score


def probabilities(count, classes=5, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), count).astype(np.float32)


def published(p, splits):
    """Salimans et al. 2016: exp E KL(p(y|x) ‖ p(y)) of consecutive parts."""
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits].astype(np.float64)
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("count, splits", [(100, 10), (103, 10), (11, 3), (7, 1)])
def test_is_the_published_formula(count, splits):
    p = probabilities(count)
    assert inception_score(p, splits=splits) == pytest.approx(published(p, splits), rel=1e-5)
    assert inception_score(torch.from_numpy(p), splits=splits) == inception_score(p, splits=splits)


def test_known_cases():
    sure = np.tile(np.eye(4, dtype=np.float32), (10, 1))  # also ln 0
    assert inception_score(sure, splits=2) == pytest.approx((4, 0))
    assert inception_score(np.full((40, 4), 0.25, np.float32), splits=2) == pytest.approx((1, 0))


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batches_and_processes_do_not_matter(batch):
    p = probabilities(103)
    sums = ScoreSums(103, 5, splits=10)
    parts = [range(i, min(i + batch, 103)) for i in range(0, 103, batch)]
    for part in parts[1::2] + parts[::2]:  # any order
        sums.append(part.start, p[part.start : part.stop])
    assert sums.score() == pytest.approx(inception_score(p), rel=1e-12)


@pytest.mark.parametrize(
    "p, message",
    [
        (probabilities(9), "of 10 parts needs at least as many images, not 9"),
        (probabilities(20) * 2, "sum to 1"),
        (probabilities(20) - 0.5, "sum to 1"),
        (probabilities(20) * np.float32("nan"), "not finite"),
    ],
    ids=["few", "sum", "negative", "nan"],
)
def test_what_does_not_fit(p, message):
    with pytest.raises(SignFastError, match=message):
        inception_score(p)

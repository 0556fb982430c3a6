"""Fréchet distance: against scipy's matrix root and known cases, streamed; the bundled classifier and teachers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from sign_fast.data import open_dataset
from sign_fast.errors import SignFastError
from sign_fast.metrics import digits_classifier
from sign_fast.metrics.frechet import FeatureStatistics, frechet_distance
from sign_fast.sampling import ImageGenerator


def gaussian(seed, dim=16, rank=None):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((dim, rank or 3 * dim))
    return rng.standard_normal(dim), a @ a.T / a.shape[1]


def test_agrees_with_scipy():
    (m1, s1), (m2, s2) = gaussian(0), gaussian(1)
    want = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("count", [4, 15, 21, 48])
def test_fewer_and_more_images_than_features(count):
    x, y = (np.random.default_rng(seed).standard_normal((count, 16)) * np.geomspace(1, 30, 16) for seed in (0, 1))
    (m1, a), (m2, b) = ((rows.mean(0), (rows - rows.mean(0)).T / np.sqrt(count - 1)) for rows in (x, y))
    s1, s2 = a @ a.T, b @ b.T
    got = frechet_distance(m1, s1, m2, s2)
    rest = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2)
    # tr (AAᵀBBᵀ)^½ is the nuclear norm of AᵀB, which needs no root of what rounding leaves of zeros
    assert got == pytest.approx(rest - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum(), rel=1e-10)
    assert got == pytest.approx(rest - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2).real), rel=1e-6)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(got, rel=1e-10)


@pytest.mark.parametrize("condition", [1e3, 1e7, 1e11])
def test_features_of_very_unequal_spread(condition):
    """The product's eigenvalues span the square of that: those below its rounding count all the same."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((128, 128)))[0]
    d1 = np.geomspace(5, 5 / condition, 128)
    d2 = d1 * np.exp(0.3 * rng.standard_normal(128))
    s1, s2 = (turn * d1) @ turn.T, (turn * d2) @ turn.T
    zero = np.zeros(128)
    want = ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(zero, s1, zero, s2) == pytest.approx(want, abs=1e-11)


def test_inceptions_width():
    dim, rank = 2048, 300
    rng = np.random.default_rng(0)
    d1, d2 = rng.uniform(0.5, 2, dim), np.zeros(dim)
    d2[:rank] = rng.uniform(0.5, 2, rank)
    v = rng.standard_normal(dim)
    v /= np.linalg.norm(v)

    def turned(d):
        """H diag(d) H with the reflection H = 1 − 2vvᵀ; two of these commute."""
        dv = d * v
        return np.diag(d) - 2 * np.outer(v, dv) - 2 * np.outer(dv, v) + 4 * (v @ dv) * np.outer(v, v)

    want = ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum() + dim
    zero = np.zeros(dim)
    assert frechet_distance(zero, turned(d2), zero + 1, turned(d1)) == pytest.approx(want, rel=1e-9)


def test_merged_statistics_are_those_of_all():
    x = np.random.default_rng(0).standard_normal((101, 8)) + 1000
    whole, merged = FeatureStatistics(8), FeatureStatistics(8)
    whole.append(x)
    for rows in (x[:40], x[40:40], x[40:]):
        part = FeatureStatistics(8)
        part.append(rows)
        merged.merge(part.count, part.mean, part.scatter)
    assert merged.count == 101 and np.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert np.allclose(merged.covariance, np.cov(x.T), rtol=1e-9)
    with pytest.raises(ValueError, match="must be of 8 features"):
        merged.merge(2, np.zeros(7), np.zeros((7, 7)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, s: (m[:3], s), "of the same features"),
        (lambda m, s: (m, s[:3]), "of the same features"),
        (lambda m, s: (m * np.nan, s), "not finite"),
        (lambda m, s: (m, s + np.inf), "not finite"),
    ],
    ids=["mean", "covariance", "nan", "inf"],
)
def test_what_does_not_fit(change, message):
    m, s = gaussian(0)
    with pytest.raises(SignFastError, match=message):
        frechet_distance(m, s, *change(m, s))


def test_known_cases():
    m, s = gaussian(2, rank=5)  # a singular covariance too
    assert frechet_distance(m, s, m, s) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(m, s, m + 3, s) == pytest.approx(9 * 16, rel=1e-6)
    one = np.eye(4)
    assert frechet_distance(np.zeros(4), one, np.zeros(4), 4 * one) == pytest.approx(4)


def test_streaming_equals_numpy():
    x = np.random.default_rng(0).standard_normal((101, 8)) + 1000
    stats = FeatureStatistics(8)
    for part in np.array_split(x, 7):
        stats.append(part)
    assert np.allclose(stats.mean, x.mean(0), rtol=1e-12)
    assert np.allclose(stats.covariance, np.cov(x.T), rtol=1e-9)


def real():
    data = open_dataset("digits")
    return torch.from_numpy(np.stack([data.image(i) for i in range(len(data))]))


def test_real_digits_are_at_distance_zero_and_noise_is_far():
    assert digits_classifier.digits_distance(real()) == pytest.approx(0, abs=1e-2)
    noise = torch.randint(0, 256, (500, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert digits_classifier.digits_distance(noise) > 200


def test_bundled_classifier_is_the_one_its_command_trains(tmp_path):
    report = digits_classifier.train(tmp_path / "out", seed=0, epochs=5)
    assert report.held_out_accuracy > 0.9
    bundled = json.loads((tmp_path / "out" / "report.json").read_text())
    assert bundled["images"] == 1797 and "train-digits-classifier" in bundled["command"]
    net, mu, sigma = digits_classifier.bundled()
    found = digits_classifier.statistics(net, real())
    # the bundled moments came from this classifier on this data
    assert np.allclose(found.mean, mu, rtol=1e-3, atol=1e-3)
    assert np.allclose(found.covariance, sigma, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name, highest", [("digits-uncond", 5.0), ("digits-cond", 10.0)])
def test_bundled_teacher_quality(name, highest):
    generator = ImageGenerator.from_pretrained(name, "cpu")
    parts = [generator(range(i, i + 500), 18).permute(0, 3, 1, 2) for i in range(0, 2000, 500)]
    assert digits_classifier.digits_distance(torch.cat(parts)) <= highest


def test_conditional_teacher_obeys_its_labels():
    generator = ImageGenerator.from_pretrained("digits-cond", "cpu")
    net = digits_classifier.bundled()[0]
    labels = [i % 10 for i in range(100)]
    images = generator(range(100), 18, labels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (net(images).argmax(1) == torch.tensor(labels)).float().mean() >= 0.95

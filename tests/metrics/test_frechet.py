"""Fréchet distance: against scipy's matrix root and known cases, streamed; the bundled classifier and teachers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from sign_fast.data import open_dataset
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

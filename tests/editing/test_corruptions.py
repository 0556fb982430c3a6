"""Corruptions by their definition, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sign_fast.editing import TASKS, AddedNoise, Blur, Edges, make_task
from sign_fast.editing.tasks import centre_unknown
from sign_fast.errors import SignFastError
from sign_fast.sampling.noise import PhiloxNoise, SeededNoise


def images(batch=3, channels=2, seed=0):
    return torch.rand(batch, channels, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_added_noise_is_the_seeds():
    truth = torch.zeros(400, 1, 6, 6)
    noisy = AddedNoise(0.2).corrupt(truth, range(400))
    assert abs(float(noisy.std()) - 0.2) < 0.005 and abs(float(noisy.mean())) < 0.005
    assert torch.equal(AddedNoise(0.2).corrupt(truth[:2], [7, 3]), noisy[[7, 3]])
    assert AddedNoise(5.0).corrupt(truth, range(400)).abs().max() == 1


def test_added_noise_is_not_that_of_the_edit():
    seeds = list(range(200))
    added = AddedNoise(0.1).corrupt(torch.zeros(200, 1, 6, 6), seeds).flatten()
    for noise in (SeededNoise("cpu", seeds), PhiloxNoise("cpu", seeds)):
        for _ in range(3):
            drawn = noise.randn([200, 1, 6, 6]).flatten()
            assert abs(float(torch.corrcoef(torch.stack([added, drawn]))[0, 1])) < 0.05


def padded(image):
    return np.pad(image, 1, mode="edge")


def test_blur():
    truth = images()
    blurred = Blur().corrupt(truth)
    for i, c, y, x in [(0, 0, 0, 0), (1, 1, 2, 3), (2, 0, 5, 1)]:
        want = padded(truth[i, c].numpy())[y : y + 3, x : x + 3].mean()
        assert abs(float(blurred[i, c, y, x]) - want) < 1e-6


def test_edges():
    truth = images()
    edges = Edges().corrupt(truth)
    for i in range(3):
        strength = np.zeros((6, 6))
        for c in range(2):
            p = padded(truth[i, c].double().numpy())
            strength += np.sqrt((p[1:-1, 2:] - p[1:-1, :-2]) ** 2 + (p[2:, 1:-1] - p[:-2, 1:-1]) ** 2) / 2
        for c in range(2):
            np.testing.assert_allclose(edges[i, c].numpy(), 2 * strength / strength.max() - 1, atol=1e-5)
    assert torch.all(Edges().corrupt(torch.full((1, 1, 4, 4), 0.3)) == -1)


def test_tasks():
    with pytest.raises(SignFastError, match="unknown task 'upscale': known: denoise, inpaint"):
        make_task("upscale")
    with pytest.raises(SignFastError, match="inpaint needs a mask"):
        make_task("inpaint")
    for std in ("nan", "inf", "0.0", "-inf"):
        with pytest.raises(SignFastError, match=f"positive standard deviation, not {std}"):
            make_task("denoise", noise_std=float(std))
    truth = images(channels=3)
    for name in TASKS:
        task = make_task(name, known=centre_unknown(6), factor=3, noise_std=0.3)
        assert (task.name, task.noise_level, task.rounds, task.teacher_noise_level) == (name, *TASKS[name])
        task.corruption.check(truth.shape)
        corrupted = task.corruption.corrupt(truth, [0, 1, 2])
        assert corrupted.shape == truth.shape and not torch.equal(corrupted, truth)
        # what is corrupted already is taken as it is
        torch.testing.assert_close(task.observe(corrupted), corrupted, rtol=0, atol=1e-6)


def test_the_middle_is_a_quarter():
    assert (~centre_unknown(8)).sum() == 16 and (~centre_unknown(32)).sum() == 256
    assert not centre_unknown(8)[2:6, 2:6].any()

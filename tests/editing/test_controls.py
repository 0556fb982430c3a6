"""The teacher's SDEdit: the known samplers where they coincide, the formula elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from sign_fast import ImageGenerator
from sign_fast.editing import KnownPixels, PatchMeans, project, sdedit
from sign_fast.editing.controls import sdedit_plan, sdedit_sigmas
from sign_fast.editing.tasks import centre_unknown
from sign_fast.errors import SignFastError
from sign_fast.models import IdempotentPrecond
from sign_fast.sampling import SeededNoise, edm_sampler
from sign_fast.sampling.edm import karras_sigmas
from sign_fast.sampling.loop import at_levels, run_plan
from tests.network_cases import network

SEEDS = [4, 9]


@pytest.fixture(scope="module")
def teacher():
    return network("ddpmpp")


def images(batch=2):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
def test_heun_from_nothing_is_the_edm_sampler(teacher, steps):
    latents = SeededNoise("cpu", SEEDS).randn([2, 3, 16, 16])
    plan = sdedit_plan(tuple(karras_sigmas(steps, 0.002, 80, 7).tolist()), "heun")
    got = run_plan(plan, at_levels(teacher, plan, None, latents.device), [torch.zeros_like(latents), latents])
    torch.testing.assert_close(got, edm_sampler(teacher, latents, num_steps=steps), rtol=0, atol=1e-6)


class Counted:
    """A denoiser that counts its calls and notes their noise levels."""

    img_resolution, img_channels = 16, 3
    sigma_min, sigma_max = 0.01, 50.0

    def __init__(self):
        self.levels = []

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, class_labels=None):
        self.levels.append(float(sigma))
        return x / (1 + sigma**2)


@pytest.mark.parametrize("constraint", [None, KnownPixels(centre_unknown(16)), PatchMeans(2)])
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_euler_by_its_formula(calls, constraint):
    net, y, tau = Counted(), images(), 0.6
    got = sdedit(net, y, noise_level=tau, calls=calls, constraint=constraint, seeds=SEEDS)
    sigmas = [*karras_sigmas(calls + 1, 0.01, 0.6 / 0.4, 7).tolist()[:-1], 0.0]
    assert net.levels == pytest.approx(sigmas[:-1]) and len(net.levels) == calls
    x = y.double() + sigmas[0] * SeededNoise("cpu", SEEDS).randn(y.shape)
    for sigma, following in itertools.pairwise(sigmas):
        denoised = x / (1 + sigma**2)
        if constraint is not None:
            denoised = constraint.restore(denoised, y.double(), *constraint.tensors)
        x = x + (following - sigma) * (x - denoised) / sigma
    torch.testing.assert_close(got.double(), x, rtol=0, atol=1e-5)
    if constraint is not None:  # holds at the end, exactly as for the student
        torch.testing.assert_close(constraint.restore(got, y, *constraint.tensors), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_heun_makes_as_many_calls(calls):
    net = Counted()
    sdedit(net, images(), noise_level=0.5, calls=calls, solver="heun", seeds=SEEDS)
    sigmas = karras_sigmas((calls + 3) // 2, 0.01, 1.0, 7).tolist()[:-1]
    assert net.levels == pytest.approx([sigma for pair in itertools.pairwise(sigmas) for sigma in pair]
                                       + sigmas[-1:])  # fmt: skip


def test_starts_from_the_students_own_input(teacher):
    """With one call at the frozen level the student is the teacher, so the two edits are one."""
    student = IdempotentPrecond.from_teacher(teacher, sigma=1.0)
    y = images()
    edited = project(student, y, noise_level=0.5, seeds=SEEDS)
    torch.testing.assert_close(sdedit(teacher, y, noise_level=0.5, calls=1, seeds=SEEDS), edited, rtol=0, atol=2e-4)


def test_levels_stay_in_the_teachers_range():
    assert sdedit_sigmas(1.0, 1, sigma_max=50.0) == (50.0,)
    assert sdedit_sigmas(0.999, 1) == (80.0,)
    assert sdedit_sigmas(0.0, 3, sigma_min=0.01) == pytest.approx((0.01,))
    assert sdedit_sigmas(0.5, 4, round_sigma=lambda s: s.round().clamp_min(0.5)) == (1.0, 0.5)


def test_classes():
    net = ImageGenerator(network("ddpmpp-cond"), "teacher")
    a = sdedit(net, images(), noise_level=0.5, calls=1, labels=[0, 1], seeds=SEEDS)
    b = sdedit(net, images(), noise_level=0.5, calls=1, labels=0, seeds=SEEDS)
    assert torch.equal(a[0], b[0]) and (a[1] - b[1]).abs().max() > 0.01
    with pytest.raises(SignFastError, match="say which"):
        sdedit(net, images(), noise_level=0.5, calls=1)


def test_refused(teacher):
    with pytest.raises(SignFastError, match="heun cannot make 2 network calls: give an odd number"):
        sdedit(teacher, images(), noise_level=0.5, calls=2, solver="heun")
    with pytest.raises(SignFastError, match="euler cannot make 0 network calls"):
        sdedit(teacher, images(), noise_level=0.5, calls=0)
    with pytest.raises(SignFastError, match="from 0 to 1, not 2"):
        sdedit(teacher, images(), noise_level=2, calls=1)
    with pytest.raises(SignFastError, match="SDEdit needs a teacher"):
        sdedit(IdempotentPrecond.from_teacher(teacher), images(), noise_level=0.5, calls=1)

"""The time-free student: its teacher's one-step denoiser to begin with, saved, loaded, optimized like any network."""

from __future__ import annotations

import pytest
import torch

from sign_fast import models, optimize
from sign_fast.checkpoints.store import find, read_config, save_network
from sign_fast.errors import SignFastError
from sign_fast.models import IdempotentPrecond
from tests.golden_rules import fill, relative_error
from tests.network_cases import inputs, network

TEACHERS = ["ddpmpp-cond", "ddpmpp-two-blocks", "ncsnpp", "skip-iddpm"]  # EDM, VP, VE, iDDPM


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("sigma", [80.0, 2.5])
def test_starts_as_the_teachers_denoiser(name, sigma):
    teacher = network(name)
    student = IdempotentPrecond.from_teacher(teacher, sigma)
    assert student.state_dict().keys() == {k for k in teacher.state_dict() if k.startswith("model.")}
    assert not student.training
    level = float(teacher.round_sigma(torch.tensor(sigma, dtype=torch.float64)))
    z, _, labels = inputs(teacher)
    u = level / (1 + level) * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    want = teacher(u.double() * (1 + level), level, labels, dtype=torch.float64)
    assert relative_error(student(u.double(), labels, dtype=torch.float64), want) <= 1e-6  # σ is float32 in the teacher
    assert relative_error(student(u, labels), want) <= 2e-5
    assert relative_error(student(u), teacher(u * (1 + level), level)) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
def test_optimized(name):
    student = IdempotentPrecond.from_teacher(network(name))
    optimized = optimize(student)
    x, _, labels = inputs(student)
    u = x / x.std()
    assert relative_error(optimized(u, labels), student(u, labels)) <= 1e-5
    assert relative_error(optimized(u), student(u)) <= 1e-5
    found = optimized.conditioning()
    assert found is optimized.conditioning((0.0, 1.0)) and found.coefficients.shape == (1, 3)
    a, b, c_in, _ = (c.flatten() for c in student.coefficients(torch.ones(1, 1, 1, 1)))
    assert torch.equal(found.coefficients[0], torch.cat([a, b, c_in]))
    with pytest.raises(SignFastError, match="does not take augment_labels"):
        optimized(u, augment_labels=torch.zeros(2, 9))


def test_gradients_reach_input_and_weights():
    student = IdempotentPrecond.from_teacher(network("ddpmpp")).requires_grad_()
    u = torch.randn(2, 3, 16, 16, requires_grad=True)
    student(u).square().sum().backward()
    assert u.grad.abs().sum() > 0 and student.model.enc["16x16_conv"].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_create_save_and_load(tmp_path):
    student = models.create("digits-uncond", cls="IdempotentPrecond", sigma=40.0)
    assert isinstance(student, IdempotentPrecond) and student.sigma == 40
    fill(student, 3).eval()
    kwargs = {**read_config(find("digits-uncond"))["kwargs"], "sigma": 40.0}
    save_network(tmp_path / "student", student.state_dict(), "IdempotentPrecond", kwargs, role="student")
    loaded = models.load(tmp_path / "student", "cpu")
    u = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert relative_error(loaded(u), student(u)) <= 2e-6  # the loaded one is in channels_last

    # of a teacher that is not EDM's the coefficients are arguments
    other = IdempotentPrecond.from_teacher(network("ddpmpp-two-blocks"))
    again = IdempotentPrecond(
        **{"img_resolution": 16, "img_channels": 3, "teacher_coefficients": other.teacher_coefficients},
        **{"model_type": "SongUNet", "model_channels": 16, "channel_mult": [2, 1, 1], "num_blocks": 2},
        **{"attn_resolutions": [8], "augment_dim": 9},
    ).eval()
    again.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), other(x))


def test_bad_calls():
    student = IdempotentPrecond.from_teacher(network("ddpmpp"))
    with pytest.raises(TypeError, match="a teacher is a denoiser"):
        IdempotentPrecond.from_teacher(student)
    with pytest.raises(SignFastError, match="unknown class 'Idempotent'"):
        models.create("digits-uncond", cls="Idempotent")
    with pytest.raises(TypeError):
        student(torch.zeros(1, 3, 16, 16), sigma=2.5)

"""The distillation losses against the published programs' numbers."""

from __future__ import annotations

import pytest
import torch

from golden_rules import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, arrays, normal, relative_error
from sign_fast import functional


@pytest.mark.parametrize("nan", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_generator_loss(alpha, nan):
    images, y_real, y_fake = (normal(seed, 5, 3, 8, 8) for seed in (1, 2, 3))
    if nan:
        y_real[2, 0, 3, 3] = float("nan")
    tensors = [t.requires_grad_() for t in (images, y_real, y_fake)]
    loss = functional.sid_generator_loss(*tensors, alpha).sum()
    loss.backward()
    golden, key = arrays("sid"), f"sid_gen/alpha{alpha}/nan{nan}"
    assert relative_error(loss, golden[f"{key}/sum"]) <= OUTPUT_TOLERANCE
    for name, t in zip(("images", "y_real", "y_fake"), tensors, strict=True):
        assert relative_error(t.grad, golden[f"{key}/grad_{name}"]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("nan", [0, 1])
def test_fake_score_loss(nan):
    images, y_fake = normal(1, 5, 3, 8, 8), normal(4, 5, 3, 8, 8)
    if nan:
        y_fake[1, 1, 2, 2] = float("nan")
    y_fake.requires_grad_()
    golden, key = arrays("sid"), f"sid_fake/nan{nan}"
    loss = functional.fake_score_loss(y_fake, images, torch.from_numpy(golden[f"{key}/sigma"])).sum()
    loss.backward()
    assert relative_error(loss, golden[f"{key}/sum"]) <= OUTPUT_TOLERANCE
    assert relative_error(y_fake.grad, golden[f"{key}/grad_y_fake"]) <= GRADIENT_TOLERANCE


def test_both_losses_at_once():
    images, y_real, y_fake = (normal(seed, 5, 3, 8, 8).requires_grad_() for seed in (1, 2, 3))
    sigma = torch.rand(5, generator=torch.Generator().manual_seed(0)) + 0.1
    student, fake = functional.distill_losses(images, y_real, y_fake, sigma)
    assert torch.equal(student, functional.sid_generator_loss(images, y_real, y_fake))
    assert torch.equal(fake, functional.fake_score_loss(y_fake, images, sigma))
    assert torch.autograd.grad(fake.sum(), images, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(student.sum(), images)[0].abs().max() > 0

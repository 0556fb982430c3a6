"""Low precision in the networks, float32 around them; loss scaling."""

from __future__ import annotations

import pytest
import torch

from sign_fast.nn import Conv2d
from tests.distill import parallel_cases as cases


def single(case, **changes):
    """A case of `parallel_cases` in float32 weights, with a loss scale that is small enough for its first step."""
    updates = cases.iteration_of(case, torch.float32, fake_updates=1, **changes)
    for trained in (updates.fake, updates.student):
        if trained.scaler.is_enabled():
            trained.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    return updates, cases.run(updates, 0, 1)[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["sid", "sida-combined", "sign-combined"])
def test_losses_are_near_those_of_float32(case, precision):
    """Within the rounding of the networks' outputs: the inner dtype's unit, times the loss's sensitivity to it."""
    _, want = single(case)
    updates, found = single(case, precision=precision)
    unit = torch.finfo(updates.networks.teacher.dtype).eps
    for name in ("loss_fake", "grad_norm_fake"):
        assert 0 < abs(found[name] - want[name]) <= 8 * unit * abs(want[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_and_optimizer_stay_float32(precision):
    updates, _ = single("sign", precision=precision)
    nets = updates.networks
    for trained in (updates.fake, updates.student):
        for p in trained.weights:
            assert p.dtype == p.grad.dtype == torch.float32
            assert trained.optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    assert {p.dtype for p in nets.ema.parameters()} == {torch.float32}
    inner = nets.teacher.dtype
    for net in (nets.teacher, nets.frozen):
        for module in net.modules():
            if isinstance(module, Conv2d):
                assert all(p.dtype == inner for p in module.parameters())
    assert {p.dtype for n, p in nets.teacher.named_parameters() if "norm" in n or "map_" in n} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16"])
def test_casting_once_changes_no_number(precision):
    updates, _ = single("sid", precision=precision)
    teacher = updates.networks.teacher
    plain = cases.iteration_of("sid", dtype=torch.float32).networks.teacher
    x, sigma = cases.normal(3, 4, *cases.SHAPE), torch.tensor([0.1, 1.0, 10.0, 80.0])
    assert torch.equal(teacher(x, sigma), plain(x, sigma, dtype=teacher.dtype))


@pytest.mark.parametrize("case", ["sid", "sid-combined", "sida-combined", "sign-combined"])
def test_loss_scaling_leaves_the_gradients(case):
    """A power of two scales without rounding: losses and norms are the same to the bit."""
    plain, scaled = cases.iteration_of(case, torch.float32), cases.iteration_of(case, torch.float32)
    scaled.fake.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    scaled.student.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    assert cases.run(scaled, 0, 1) == cases.run(plain, 0, 1)


def test_a_step_that_overflows_is_left_away():
    updates = cases.iteration_of("sid-combined", dtype=torch.float32, precision="fp16")
    for trained in (updates.fake, updates.student):
        trained.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.clone() for trained in (updates.fake, updates.student) for p in trained.weights]
    (found,) = cases.run(updates, 0, 1)
    assert found["grad_norm_fake"] != found["grad_norm_fake"] or found["grad_norm_fake"] == float("inf")
    after = [p for trained in (updates.fake, updates.student) for p in trained.weights]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert updates.fake.scaler.get_scale() == updates.student.scaler.get_scale() == 2.0**59


def test_loss_scaling_is_resumed():
    updates = cases.iteration_of("sid", dtype=torch.float32, precision="fp16")
    updates.fake.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    cases.run(updates, 0, 1)
    again = cases.iteration_of("sid", dtype=torch.float32, precision="fp16")
    again.load_state(updates.state())
    assert again.fake.scaler.get_scale() == 2.0**59


def test_gradients_that_are_not_finite_are_zero_or_large():
    updates = cases.iteration_of("sid", dtype=torch.float32)
    fake = updates.fake
    fake.begin()
    for p in fake.weights:
        p.grad = torch.zeros_like(p)
    bias = next(p for p in fake.weights if p.ndim == 1 and p.numel() > 3)
    bias.grad[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    fake.step()
    assert bias.grad[:4].tolist() == [0, 1e5, -1e5, 2]

"""SiD's updates: the combined one against the losses it is made of, the mixture over calls, NaN images."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.distill import levels
from sign_fast.distill.draws import Stream
from sign_fast.distill.settings import DistillSettings
from tests.distill.small import BATCH, close, gradients, iteration, step


@pytest.mark.parametrize("cond", [False, True])
@pytest.mark.parametrize("call", [1, 3])
def test_combined_gradients_are_those_of_the_two_losses(cond, call):
    run = iteration("sid", cond=cond, steps=4)
    method, nets = run.method, run.networks
    given = step(10 if cond else 0, call=call)
    run.fake.begin()
    run.student.begin()
    losses = method.combined_backward(run.fake, run.student, given)
    fake, student = gradients(nets.fake), gradients(nets.student)

    run.fake.train_weights(False)
    run.student.begin()
    (separate := method.student_losses(run.student, given)["loss_student"]).sum().mul(run.student.factor).backward()
    close(student, gradients(nets.student))
    torch.testing.assert_close(losses["loss_student"], separate.detach(), rtol=1e-4, atol=1e-4)

    run.fake.begin()
    images, labels, _ = method.student_images(run.student, given)
    noisy, sigma = method.noised(images.detach(), given)
    loss = functional.fake_score_loss(nets.fake(noisy, sigma, labels), images.detach(), sigma)
    loss = loss * levels.level_ratio(sigma, run.settings).flatten()
    (loss.sum() * run.fake.factor).backward()
    close(fake, gradients(nets.fake))
    torch.testing.assert_close(losses["loss_fake"], loss.detach(), rtol=1e-4, atol=1e-4)


def test_level_ratio_makes_up_for_the_other_levels():
    settings = DistillSettings("sid", "")
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    sigma = levels.student_sigma(u, settings.tmax)
    ratio = levels.level_ratio(sigma, settings)
    assert float(ratio.max()) < 3.4
    # the densities are of lnσ: means of any function agree but for the levels above the largest
    log_sigma = torch.distributions.Normal(settings.P_mean, settings.P_std).icdf(u)
    below = log_sigma.exp().clamp(max=float(sigma.max()))
    for function in (torch.ones_like, lambda s: 1 / (1 + s), lambda s: s.log().abs()):
        assert float((ratio * function(sigma)).mean()) == pytest.approx(float(function(below).mean()), rel=3e-3)


@pytest.mark.parametrize(
    ("method", "changes", "want"),
    [
        ("sid", {}, 1.4e-4),
        ("sid", {"P_mean": -0.6, "P_std": 1.4}, 3.4e-3),
        ("sida", {"tmin": 200, "tmax": 400}, 0.31),
        ("sign", {}, 1.25e-2),
    ],
)
def test_share_left_out_is_that_of_the_draws(method, changes, want):
    s = DistillSettings(method, "", **changes)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = torch.distributions.Normal(s.P_mean, s.P_std).icdf(u).exp()
    t = 0.02 + 0.96 * u
    sigma = t / (1 - t) if method == "sign" else levels.student_sigma(u, s.tmax, s.tmin)
    share = float(((drawn < sigma.min()) | (drawn > sigma.max())).double().mean())
    assert levels.share_left_out(s) == pytest.approx(share, abs=2e-5)
    assert share == pytest.approx(want, rel=0.05)


def test_the_gradient_goes_through_the_last_call_only():
    run = iteration("sid", steps=3)
    student, given = run.networks.student, step(call=3)
    calls = []
    handle = student.register_forward_hook(lambda net, inputs, output: calls.append(output.requires_grad))
    run.student.begin()
    images, _, _ = run.method.student_images(run.student, given)
    handle.remove()
    assert calls == [False, False, True] and images.requires_grad
    levels = run.method.levels
    with torch.no_grad():  # the roll-out is the few-step sampler's
        x = levels[0] * given.draws.normal(Stream.STUDENT_LATENT, (1, 8, 8))
        for i in (1, 2):
            x = student(x, levels[i - 1]) + levels[i] * given.draws.normal(Stream.STUDENT_RENOISE + i, (1, 8, 8))
        torch.testing.assert_close(images.detach(), student(x, levels[2]))


@pytest.mark.parametrize("method", ["sid", "sida", "sign"])
def test_a_nan_image_counts_nothing_for_the_fake_score(method):
    run = iteration(method)
    hurt = torch.zeros(BATCH, 1, 8, 8)
    hurt[2, 0, 3, 3] = float("nan")
    handle = run.networks.student.register_forward_hook(lambda net, inputs, output: output + hurt)
    run.fake.begin()
    losses = run.method.fake_losses(run.fake, step())
    handle.remove()
    assert (losses["loss_fake"] > 0).tolist() == [True, True, False, True, True, True]
    losses["loss_fake"].sum().backward()
    found = gradients(run.networks.fake)

    run.fake.begin()
    whole = run.method.fake_losses(run.fake, step())["loss_fake"]
    (whole.sum() - whole[2]).backward()
    close(found, gradients(run.networks.fake))


@pytest.mark.parametrize("update", ["alternating", "combined"])
@pytest.mark.parametrize("method, cond, call", [("sid", True, 1), ("sid", False, 3), ("sida", False, 1)])
def test_regression_on_the_teachers_pairs_adds_its_loss_and_gradient(method, update, cond, call):
    run = iteration(method, cond=cond, steps=4, reg=0.3, adversarial_weight=0.1, update=update)
    student, generator = run.networks.student, torch.Generator().manual_seed(3)
    z, y = (torch.randn(BATCH, 4, 1, 8, 8, generator=generator) for _ in range(2))  # of each of four calls
    labels = torch.eye(10)[torch.arange(BATCH)] if cond else None
    without = step(10 if cond else 0, call=call)
    given = step(10 if cond else 0, call=call, pairs=(z, y, labels))

    def found(given):
        run.fake.begin()
        run.student.begin()
        if update == "combined":
            losses = run.method.combined_backward(run.fake, run.student, given)
        else:
            run.fake.train_weights(False)
            losses = run.method.student_losses(run.student, given)
            run.student.scaled(list(losses.values())).backward()
        return losses, {name: grad.clone() for name, grad in gradients(student).items()}

    losses, both = found(given)
    others, alone = found(without)
    assert losses.keys() - others.keys() == {"reg"}

    run.student.begin()
    k, sigma = call - 1, run.method.levels[call - 1]
    by_hand = 0.3 * (student(sigma * z[:, k], torch.tensor(sigma), labels) - y[:, k]).square().sum((1, 2, 3))
    torch.testing.assert_close(losses["reg"].detach(), by_hand.detach(), rtol=1e-4, atol=1e-4)
    (by_hand.sum() * run.student.factor).backward()
    close({name: both[name] - alone[name] for name in both}, gradients(student))

"""SIGN's terms by formula, each switchable, and what their gradients reach."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.distill.draws import Stream
from sign_fast.distill.levels import fake_density
from sign_fast.distill.sign import flow_grid, ode_step, squared_distance
from tests.distill.small import BATCH, close, gradients, iteration, step

SHAPE = (1, 8, 8)


def terms(run, given):
    run.fake.train_weights(False)
    run.student.begin()
    return run.method.student_losses(run.student, given)


@pytest.mark.parametrize("cond", [False, True])
def test_terms_by_formula(cond):
    run = iteration("sign", cond=cond, rec=0.5, idem=3, flow=2, dmd=1.5, reg=0.7, flow_steps=7)
    generator = torch.Generator().manual_seed(2)
    label_dim = 10 if cond else 0
    pairs = tuple(torch.randn(BATCH, *SHAPE, generator=generator) for _ in range(2))
    given = step(label_dim, idem=0.25)
    given = step(label_dim, idem=0.25, pairs=(*pairs, given.labels))
    found = {name: loss.detach() for name, loss in terms(run, given).items()}

    nets, draws = run.networks, given.draws
    x, labels, f = given.images, given.labels, nets.student
    with torch.no_grad():
        z_labels = draws.labels(Stream.STUDENT_LABEL, label_dim)
        g = f(draws.normal(Stream.STUDENT_LATENT, SHAPE), z_labels)
        want = {
            "rec": 0.5 * squared_distance(f(x, labels), x),
            "idem": 3 * 0.25 * squared_distance(f(g, z_labels), g),
            "reg": 0.7 * squared_distance(f(pairs[0], labels), pairs[1]),
        }
        grid = torch.tensor(flow_grid(7))
        index = (draws.uniform(Stream.FLOW_LEVEL) * 7).long()
        t, after = grid[index], grid[index + 1]
        u = (1 - t) * x + t * draws.normal(Stream.FLOW_NOISE, SHAPE)
        clean = nets.teacher(u / (1 - t), t / (1 - t), labels)
        u_after = clean + (u - clean) * after / t
        target = torch.where(after > 0, f(u_after, labels), u_after)
        want["flow"] = 2 * squared_distance(f(u, labels), target)
        t = 0.02 + 0.96 * draws.uniform(Stream.STUDENT_LEVEL)
        sigma = t / (1 - t)
        noisy = g + sigma * draws.normal(Stream.STUDENT_NOISE, SHAPE)
        y_real, y_fake = nets.teacher(noisy, sigma, z_labels), nets.fake(noisy, sigma, z_labels)
        direction = (y_fake - y_real) / (g - y_real).abs().mean((1, 2, 3), keepdim=True)
        want["dmd"] = 1.5 * 0.5 * direction.square().flatten(1).sum(1)
    assert found.keys() == want.keys()
    for name, loss in want.items():
        torch.testing.assert_close(found[name], loss, rtol=2e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("left_out", ["rec", "idem", "flow", "dmd"])
def test_each_term_can_be_left_out(left_out):
    run = iteration("sign", **{left_out: 0})
    assert set(terms(run, step())) == {"rec", "idem", "flow", "dmd"} - {left_out}


def test_sid_in_the_place_of_dmd():
    run = iteration("sign", matching="sid", rec=0, idem=0, flow=0)
    losses = terms(run, step())
    assert set(losses) == {"sid"}
    losses["sid"].sum().backward()
    assert any(float(g.abs().max()) > 0 for g in gradients(run.networks.student).values())
    assert not gradients(run.networks.fake)


def test_idempotence_reaches_the_weights_through_g_alone():
    run = iteration("sign", rec=0, flow=0, dmd=0)
    terms(run, step())["idem"].sum().backward()
    found = gradients(run.networks.student)
    draws, nets = step().draws, run.networks
    assert not gradients(nets.frozen)
    run.student.begin()
    g = nets.student(draws.normal(Stream.STUDENT_LATENT, SHAPE))
    whole = dict(nets.student.named_parameters())
    detached = {name: p.detach() for name, p in whole.items()}
    again = torch.func.functional_call(nets.student, detached, (g,))
    squared_distance(again, g).sum().backward()
    close(found, gradients(nets.student))


def test_den_scales_the_fake_scores_loss():
    found = []
    for den in (1, 0.5):
        run = iteration("sign", den=den)
        found.append(run.method.fake_losses(run.fake, step())["loss_fake"].detach())
    assert float(found[0].min()) > 0
    torch.testing.assert_close(found[1], found[0] / 2)


def test_combined_gradients_are_those_of_the_two_losses():
    run = iteration("sign", cond=True)
    method, nets, given = run.method, run.networks, step(10, idem=0.5)
    run.fake.begin()
    run.student.begin()
    losses = method.combined_backward(run.fake, run.student, given)
    fake, student = gradients(nets.fake), gradients(nets.student)
    separate = terms(run, given)
    run.student.scaled(list(separate.values())).backward()
    close(student, gradients(nets.student))
    assert set(losses) == {*separate, "loss_fake"}

    run.fake.begin()
    with torch.no_grad():
        labels = given.draws.labels(Stream.STUDENT_LABEL, 10)
        g = nets.student(given.draws.normal(Stream.STUDENT_LATENT, SHAPE), labels)
    t = 0.02 + 0.96 * given.draws.uniform(Stream.STUDENT_LEVEL)
    sigma = t / (1 - t)
    y_fake = nets.fake(g + sigma * given.draws.normal(Stream.STUDENT_NOISE, SHAPE), sigma, labels)
    ratio = fake_density(sigma, run.settings) / (t * (1 - t) / 0.96)
    (functional.fake_score_loss(y_fake, g, sigma) * ratio.flatten()).sum().mul(run.fake.factor).backward()
    close(fake, gradients(nets.fake))


def test_flow_grid_and_ode_step():
    grid = flow_grid(5)
    assert grid[0] == pytest.approx(80 / 81) and grid[-1] == 0 and sorted(grid, reverse=True) == grid
    # a teacher of a single image: its flow is a straight line, and a step of any length is exact
    image, noise = torch.full((2, 1, 4, 4), 0.3), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t, after = torch.tensor([0.9, 0.5]).reshape(2, 1, 1, 1), torch.tensor([0.2, 0.0]).reshape(2, 1, 1, 1)
    got = ode_step((1 - t) * image + t * noise, t, after, image)
    torch.testing.assert_close(got, (1 - after) * image + after * noise)

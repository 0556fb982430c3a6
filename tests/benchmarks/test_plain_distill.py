"""The baseline of training is the published loop: its losses and two whole iterations, against the golden numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain_distill
from benchmarks.plain_distill import PlainSiD, StepDraws, fake_loss, generator_loss
from sign_fast import models
from tests.golden_rules import GRADIENT_TOLERANCE, arrays, fill, filled, normal, relative_error, settings

STEPS = [name for name in settings("sid") if name.startswith("step/")]
LR = 1e-3  # of the golden iterations


def draws(entry, key, iteration, step, level):
    """Of one step, as the golden file has them."""
    seed = entry[f"z_{step}_seed"][iteration]
    kwargs = entry["kwargs"]
    side, classes = kwargs["img_resolution"], kwargs["label_dim"]
    recorded = {
        name: torch.from_numpy(arrays("sid")[f"{key}/it{iteration}/{step}_{name}"]) for name in (level, "noise")
    }
    labels = torch.eye(classes)[: entry["B"]] if classes else None
    return StepDraws(normal(seed, entry["B"], 3, side, side), recorded[level], recorded["noise"], labels)


def by_rounding_alone(name, p, updates):
    """How far two right runs may part in the norm of p.

    A key's bias has no gradient but rounding (softmax does not see it), and Adam makes a step of lr out of that.
    """
    return 2 * LR * updates * (p.numel() / 3) ** 0.5 if name.endswith("qkv.bias") else 0.0


def term_sizes(images, y_real, y_fake, alpha):
    """Σ|terms| of `generator_loss`."""
    difference = y_real - y_fake
    terms = difference * ((y_real - images) - alpha * difference)
    return float((terms / (images - y_real).abs().mean(dim=(1, 2, 3), keepdim=True)).abs().sum())


def gradient_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("key", STEPS)
def test_two_iterations_are_the_published_ones(key, monkeypatch):
    import sign_fast.functional as functional

    for operation in functional.__all__:
        monkeypatch.delattr(functional, operation)
    entry = settings("sid")[key]
    teacher = fill(getattr(models, entry["cls"])(**entry["kwargs"]), entry["weights_seed"])
    loop = PlainSiD(teacher, entry["B"], alpha=float(key.split("alpha")[1]), lr=LR)
    with torch.no_grad():
        for name, p in loop.fake.net.named_parameters():
            p.add_(0.02 * filled(entry["fake_perturb_seed"], name, p))
    terms = []  # Σ|terms| of the student's losses, whose sums cancel: their roundings are those of the terms

    def recorded(images, y_real, y_fake, alpha):
        with torch.no_grad():
            terms.append(term_sizes(images, y_real, y_fake, alpha) * loop.student_scale / entry["B"])
        return generator_loss(images, y_real, y_fake, alpha)

    monkeypatch.setattr(plain_distill, "generator_loss", recorded)
    for i, record in enumerate(entry["records"]):
        fake, student = loop.iteration(draws(entry, key, i, "fake", "normal"), draws(entry, key, i, "gen", "uniform"))
        got = {
            "loss_fake": fake,
            "loss_G": student,
            "gnorm_fake": gradient_norm(loop.fake),
            "gnorm_G": gradient_norm(loop.student),
            "ema_beta": loop.beta,
        }
        for name, value in got.items():
            size = terms[i] if name == "loss_G" else abs(record[name])
            assert abs(float(value) - record[name]) <= GRADIENT_TOLERANCE * size, f"iteration {i}: {name}"
        for letter, net in (("F", loop.fake), ("G", loop.student), ("E", loop.ema)):
            parameters = dict(net.net.named_parameters())
            for name, norm in record[f"pnorm_{letter}"].items():
                allowed = GRADIENT_TOLERANCE * norm + by_rounding_alone(name, parameters[name], i + 1)
                assert abs(float(parameters[name].detach().norm()) - norm) <= allowed, f"{i}: {letter} {name}"
    moved = [p for p, q in zip(loop.teacher.parameters(), teacher.parameters(), strict=True) if not torch.equal(p, q)]
    assert not moved


@pytest.mark.parametrize("nan", [0, 1])
@pytest.mark.parametrize("alpha", ["1.0", "1.2"])
def test_generator_loss(alpha, nan):
    images, y_real, y_fake = (normal(seed, 5, 3, 8, 8) for seed in (1, 2, 3))
    if nan:
        y_real[2, 0, 3, 3] = torch.nan
    named = {"images": images, "y_real": y_real, "y_fake": y_fake}
    loss = generator_loss(*(t.requires_grad_() for t in named.values()), float(alpha))
    loss.backward()
    key = f"sid_gen/alpha{alpha}/nan{nan}"
    assert relative_error(loss, arrays("sid")[f"{key}/sum"]) <= GRADIENT_TOLERANCE
    for name, t in named.items():
        assert relative_error(t.grad, arrays("sid")[f"{key}/grad_{name}"]) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("nan", [0, 1])
def test_fake_loss(nan):
    images, y_fake = normal(1, 5, 3, 8, 8), normal(4, 5, 3, 8, 8)
    if nan:
        y_fake[1, 1, 2, 2] = torch.nan
    key = f"sid_fake/nan{nan}"
    loss = fake_loss(y_fake.requires_grad_(), images, torch.from_numpy(arrays("sid")[f"{key}/sigma"]))
    loss.backward()
    assert relative_error(loss, arrays("sid")[f"{key}/sum"]) <= GRADIENT_TOLERANCE
    assert relative_error(y_fake.grad, arrays("sid")[f"{key}/grad_y_fake"]) <= GRADIENT_TOLERANCE

"""A small distillation: networks with random weights, their methods and steps."""

from __future__ import annotations

import torch

from sign_fast import models
from sign_fast.distill.draws import Draws
from sign_fast.distill.iteration import Iteration
from sign_fast.distill.method import Step
from sign_fast.distill.networks import build_networks
from sign_fast.distill.settings import DistillSettings
from sign_fast.models.presets import preset

BATCH = 6


def iteration(method, *, cond=False, **settings):
    """An `Iteration` whose fake score and student have moved away from the teacher."""
    name = "digits-cond" if cond else "digits-uncond"
    cls, kwargs = preset(name)
    kwargs |= {"model_channels": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = models.create(name, model_channels=8)
        for p in teacher.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        networks = build_networks(teacher, cls, kwargs, time_free=method == "sign")
        for net in (networks.fake, networks.student):
            for p in net.parameters():
                p.data.add_(0.02 * torch.randn_like(p))
    if networks.frozen is not None:
        networks.frozen.load_state_dict(networks.student.state_dict())
    return Iteration(DistillSettings(method, "", batch=BATCH, **settings), networks)


def step(label_dim=0, **changes):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.eye(label_dim)[torch.arange(BATCH) % label_dim] if label_dim else None
    given = {"images": images, "labels": labels, **changes}
    return Step(Draws(Draws.seeds_at(5, 0, 0, BATCH)), **given)


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def close(a, b, tolerance=1e-4):
    """Equal up to float32's summation: relative to the largest gradient of all."""
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in b.values())
    assert scale > 0
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance * scale)

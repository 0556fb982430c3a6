"""The modules are their functions with stored arguments."""

from __future__ import annotations

import torch

from sign_fast import functional, nn


def test_attention():
    qkv = torch.randn(2, 24, 3, 3)
    for interleaved in (True, False):
        got = nn.Attention(2, interleaved)(qkv)
        assert torch.equal(got, functional.projected_attention(qkv, 2, interleaved=interleaved))
    assert not torch.equal(got, nn.Attention(1, interleaved)(qkv))


def test_distill_loss():
    images, y_real, y_fake = torch.randn(3, 2, 3, 4, 4)
    sigma, weight = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0])
    got = nn.DistillLoss(1.0, 0.7)(images, y_real, y_fake, sigma, weight=weight)
    want = functional.distill_losses(images, y_real, y_fake, sigma, 1.0, 0.7, weight=weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(got[0], nn.DistillLoss()(images, y_real, y_fake, sigma)[0])


def test_sampler_step():
    x, f = torch.randn(2, 2, 3, 4, 4)
    c_skip, c_out, seeds = torch.rand(2), torch.rand(2), torch.tensor([1, -5])
    got = nn.SamplerStep(0.5, 2.0)(x, f, c_skip, c_out, seeds=seeds, step=3)
    assert torch.equal(got, functional.sampler_step(x, f, c_skip, c_out, seeds=seeds, step=3, scale=0.5, sigma=2.0))
    assert torch.equal(
        nn.SamplerStep()(x, f, c_skip, c_out),
        functional.precondition(x, f, *(t.view(2, 1, 1, 1) for t in (c_skip, c_out))),
    )

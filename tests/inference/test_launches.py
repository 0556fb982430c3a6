"""Launches of a forward: the rule, and what is left of them after optimize."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sign_fast import functional, models, optimize
from sign_fast.inference.launches import LaunchCounter, launches
from sign_fast.kernels.dispatch import taken
from tests.network_cases import network


def test_the_rule():
    pytest.importorskip("triton")
    x = torch.empty(2, 64, 8, 8, device="meta").contiguous(memory_format=torch.channels_last)
    w, b = torch.empty(64, 64, 3, 3, device="meta"), torch.empty(64, device="meta")
    with LaunchCounter() as counter:
        y = F.conv2d(x, w, b, padding=1)
        z = functional.group_norm_silu((x, y), 32, None, None, emb=torch.empty(2, 128, device="meta"))
        z = z.permute(0, 2, 3, 1).reshape(-1, 128)[:, :3].chunk(2)[0] + 1
        torch.empty_like(z)
        torch.ones(3)  # on the host
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert counter.counts == {"convolution": 1, "add_ (bias)": 1, "group_norm_silu": 1, "add": 1}


def test_a_norm_of_two_launches_counts_two():
    pytest.importorskip("triton")
    x = torch.empty(1, 128, 512, 512, device="meta", dtype=torch.bfloat16)
    with LaunchCounter() as counter:
        functional.group_norm_silu(x.contiguous(memory_format=torch.channels_last), 32, None, None)
        counter.counts.pop("clone")
    assert counter.counts == {"group_norm_silu": 2}


@pytest.mark.parametrize("name", ["ddpmpp-cond", "ncsnpp", "skip-iddpm", "adm-cond"])
def test_fewer_than_before(name):
    pytest.importorskip("triton")
    net = network(name)
    for dtype in (torch.float32, torch.bfloat16):
        before, after = launches(net, dtype=dtype), launches(optimize(net, dtype))
        assert after.total() < 0.6 * before.total()
        assert after["cat"] == 0 and after["mul"] == 1  # the image's, by c_in
        assert after["group_norm_silu"] + after["residual_group_norm_silu"] == (
            before["group_norm_silu"] + before["residual_group_norm_silu"]
        )


def test_cifar10():
    pytest.importorskip("triton")
    with torch.device("meta"):
        net = models.create("cifar10-uncond-vp").eval().requires_grad_(False)
    after = launches(optimize(net, torch.bfloat16), 256)
    assert launches(net, dtype=torch.bfloat16).total() > 600 and after.total() <= 206
    assert after["convolution"] == 68 and after["group_norm_silu"] + after["residual_group_norm_silu"] == 73


def test_counting_runs_nothing():
    pytest.importorskip("triton")
    net = network("ddpmpp")
    before = [p.clone() for p in net.parameters()]
    launches(net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(not p.is_meta for p in net.parameters()) and taken["group_norm_silu", "triton"]

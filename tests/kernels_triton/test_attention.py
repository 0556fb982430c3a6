"""The Triton kernels of attention against float64, beside plain torch: values and every gradient."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels import dispatch
from sign_fast.kernels.attention import config, reference
from sign_fast.kernels.device import KNOWN
from tests.oracle import TRITON_DEVICE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g) * scale).to(dtype) for _ in range(4)]


def run(function, q, k, v, upstream, dtype=None, device=None):
    """(out, dq, dk, dv) of `function` on copies of the inputs."""
    q, k, v, upstream = (t.to(device=device, dtype=dtype) for t in (q, k, v, upstream))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def check(q, k, v, upstream):
    want = run(reference.attention, q, k, v, upstream, torch.float64)
    base = run(reference.attention, q, k, v, upstream)
    before = dispatch.taken["attention", "triton"]
    got = run(functional.attention, q, k, v, upstream, device=TRITON_DEVICE)
    assert dispatch.taken["attention", "triton"] == before + 1
    logits = (q.double() @ k.double().transpose(-1, -2)).abs().max() / q.shape[-1] ** 0.5
    for name, *three in zip(("out", "dq", "dk", "dv"), got, want, base, strict=True):
        terms = magnitudes(name, q, k, v, upstream)
        if q.dtype == torch.float32 and logits > 1:
            # the backward works the weights out again: a float32 logit's rounding is a relative one of its weight
            terms = (three[1] if terms is None else terms) * logits
        assert_close(*three, name, terms)


def magnitudes(name, q, k, v, upstream):
    """dq and dk are sums of p·(dp − Σ p·dp), which cancels: what is added up without its signs, None for the others."""
    if name not in ("dq", "dk"):
        return None
    q, k, v, upstream = (t.double() for t in (q, k, v, upstream))
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    dp = (upstream @ v.transpose(-1, -2)).abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return ds @ k.abs() if name == "dq" else ds.transpose(-1, -2) @ q.abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, channels", [(16, 256), (64, 256), (64, 64), (64, 40), (100, 80), (17, 8), (33, 160)])
def test_against_float64(tokens, channels, dtype):
    check(*draw((2, 2, tokens, channels), dtype))


def test_published_cifar_shape():
    check(*draw((1, 1, 256, 256), torch.bfloat16))


@pytest.mark.parametrize("tokens, channels", [(1, 1), (3, 5), (130, 24)])
def test_any_size(tokens, channels):
    check(*draw((1, 3, tokens, channels), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [64, 50])
def test_large_logits_stay_finite(tokens, dtype):
    """Logits of hundreds, and rows whose logsumexp is far below zero: masked keys must not turn into NaN."""
    q, k, v, upstream = draw((1, 1, tokens, 64), dtype, scale=6.0)
    check(q, k, v, upstream)
    k = k.abs()
    check(-q.abs(), k, v, upstream)


def test_constant_values_come_back():
    q, k, _, _ = draw((1, 2, 40, 32), torch.float32)
    v = torch.full_like(q, 1.75)
    out = functional.attention(*(t.to(TRITON_DEVICE) for t in (q, k, v)))
    assert (out - 1.75).abs().max() <= 4 * torch.finfo(torch.float32).eps * 1.75


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "in_turn"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_is_read_where_it_lies(dtype, channels_last, interleaved):
    """Values and gradient of the whole projection, in its memory format, against q, k, v taken apart by hand."""
    batch, heads, channels, size = 2, 2, 24, 5
    g = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    qkv = torch.randn(batch, 3 * heads * channels, size, size, generator=g).to(dtype).contiguous(memory_format=layout)
    upstream = torch.randn(batch, heads * channels, size, size, generator=g).to(dtype)

    def by_hand(x):
        rows = x.flatten(2)
        if interleaved:
            parts = rows.reshape(batch, heads, channels, 3, -1).unbind(3)
        else:
            parts = rows.reshape(batch, 3, heads, channels, -1).unbind(1)
        q, k, v = (part.transpose(2, 3) for part in parts)
        return reference.attention(q, k, v).transpose(2, 3).reshape(batch, heads * channels, size, size)

    def both(function, x, gradient):
        x = x.detach().requires_grad_()
        y = function(x)
        return y, *torch.autograd.grad(y, x, gradient)

    want = both(by_hand, qkv.double(), upstream.double())
    base = both(by_hand, qkv, upstream)
    got = both(
        lambda x: functional.projected_attention(x, heads, interleaved=interleaved),
        qkv.to(TRITON_DEVICE),
        upstream.to(TRITON_DEVICE),
    )
    for name, *three in zip(("out", "dqkv"), got, want, base, strict=True):
        assert three[0].is_contiguous(memory_format=layout)
        assert_close(*three, name)


def test_strided_views_equal_packed_ones():
    """(B, T, 3, heads, d), as a linear projection leaves it, without copies; equal to the bit."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 48, 3, 4, 16, generator=g).to(TRITON_DEVICE)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    assert torch.equal(functional.attention(*views), functional.attention(*(t.contiguous() for t in views)))
    flat = [t.reshape(8, 48, 16) for t in views]
    assert torch.equal(functional.attention(*flat).reshape(2, 4, 48, 16), functional.attention(*views))


def test_two_runs_are_equal_to_the_bit():
    inputs = [t.to(TRITON_DEVICE) for t in draw((2, 2, 70, 32), torch.float32)]
    for one, two in zip(run(functional.attention, *inputs), run(functional.attention, *inputs), strict=True):
        assert torch.equal(one, two)


def test_second_derivatives_are_right():
    q, k, v, _ = draw((1, 2, 9, 8), torch.float32)

    def second(function, dtype=None, device=None):
        leaves = [t.to(device=device, dtype=dtype).requires_grad_() for t in (q, k, v)]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    results = (
        second(functional.attention, device=TRITON_DEVICE),
        second(reference.attention, torch.float64),
        second(reference.attention),
    )
    for got, want, base in zip(*results, strict=True):
        assert_close(got, want, base)


def test_empty_batch():
    q = torch.empty(0, 2, 16, 8, device=TRITON_DEVICE, requires_grad=True)
    functional.attention(q, q, q).sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("architecture", sorted(KNOWN))
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_plan_fits_its_device(architecture, itemsize):
    device = KNOWN[architecture]
    for kernel in ("forward", "backward_query", "backward_key"):
        for channels in range(1, 257):
            chosen = config.plan(kernel, 4096, channels, itemsize, 64, device)
            assert chosen.block_channels >= max(16, channels)
            row = chosen.block_channels * itemsize
            blocks = (chosen.block_queries, chosen.block_keys, row, chosen.num_stages)
            assert config._shared_bytes(kernel, *blocks) <= device.shared_bytes

"""Attention on the CPU, PyTorch's flash attention behind the library's operators, and its plain form for float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels import dispatch
from sign_fast.kernels.attention import op, reference
from tests.oracle import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype, count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


def values_and_gradients(function, upstream, *inputs):
    """(output, gradient of each input), in the inputs' dtype."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(inputs[0].dtype))


def check(fast, plain, upstream, *inputs):
    """Rule 1 for the output and every gradient, the fast path taken once; returns them."""
    want = values_and_gradients(plain, upstream, *(t.double() for t in inputs))
    base = values_and_gradients(plain, upstream, *inputs)
    before = dispatch.taken["attention", "flash"]
    got = values_and_gradients(fast, upstream, *inputs)
    assert dispatch.taken["attention", "flash"] == before + 1
    for i, three in enumerate(zip(got, want, base, strict=True)):
        assert_close(*three, "out" if i == 0 else f"gradient {i - 1}")
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 64, 256), (6, 49, 64), (1, 16, 8), (3, 100, 24), (2, 3, 17, 40), (1, 2, 1, 1), (2, 2, 40, 320)],
    ids=str,
)
def test_values_and_gradients(shape, dtype):
    *inputs, upstream = draw(shape, dtype)
    check(functional.attention, reference.attention, upstream, *inputs)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_without_gradients_the_values_are_the_same(gradients):
    q, k, v = draw((2, 2, 20, 16), torch.float32, 3)
    with torch.set_grad_enabled(gradients):
        assert not functional.attention(q, k, v).requires_grad
        mixed = functional.attention(q, k, v.detach().requires_grad_())
    assert mixed.requires_grad == gradients
    assert torch.equal(mixed.detach(), functional.attention(q, k, v))


def test_strided_views_equal_packed_ones():
    """(B, T, 3, heads, d) as a linear projection leaves it, channel-major planes, and a step between channels."""
    (packed,) = draw((2, 24, 3, 4, 16), torch.float32, 1)
    (planes,) = draw((2, 4, 16, 24), torch.float32, 1, seed=1)
    for q, k, v in (
        [packed[:, :, i].transpose(1, 2) for i in range(3)],
        [planes.mul(i + 1).transpose(2, 3) for i in range(3)],
        [packed[:, :, i].transpose(1, 2)[..., ::2] for i in range(3)],
    ):
        views = functional.attention(q, k, v)
        assert torch.equal(views, functional.attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_the_result_is_token_major():
    """What follows joins the heads of a token: a view, not a copy, of the result and of its gradients."""
    q, k, v = (t.requires_grad_() for t in draw((2, 3, 10, 8), torch.float32, 3))
    out = functional.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    joined = out.transpose(1, 2).flatten(2)
    assert joined.data_ptr() == out.data_ptr() and joined.is_contiguous()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_an_empty_batch(gradients, dtype):
    q, k, v = (t.requires_grad_(gradients) for t in draw((0, 2, 16, 8), dtype, 3))
    out = functional.attention(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    if gradients:
        assert torch.autograd.grad(out, q, torch.ones_like(out))[0].shape == q.shape


# ---- straight from the projection ----


def taken_apart(num_heads, interleaved):
    """projected_attention by index, in plain torch: q, k and v of every head by the row that the docstring names."""

    def attention(qkv):
        batch, rows, height, width = qkv.shape
        channels = rows // 3 // num_heads
        heads, part, c = torch.meshgrid(torch.arange(num_heads), torch.arange(3), torch.arange(channels), indexing="ij")
        within = heads * channels + c
        row = 3 * within + part if interleaved else num_heads * channels * part + within
        q, k, v = qkv.flatten(2)[:, row].permute(2, 0, 1, 4, 3)  # (3, B, heads, T, d)
        return reference.attention(q, k, v).transpose(2, 3).reshape(batch, -1, height, width)

    return attention


PROJECTIONS = list(itertools.product([True, False], [torch.channels_last, torch.contiguous_format]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved, layout", PROJECTIONS, ids=str)
@pytest.mark.parametrize("heads, channels, size", [(1, 48, (4, 4)), (3, 20, (5, 3)), (2, 1, (1, 1))], ids=str)
def test_projection(heads, channels, size, interleaved, layout, dtype):
    qkv, _ = draw((2, 3 * heads * channels, *size), dtype, 2)
    (upstream,) = draw((2, heads * channels, *size), dtype, 1, seed=1)

    def fast(x):
        return functional.projected_attention(x, heads, interleaved=interleaved)

    qkv = qkv.contiguous(memory_format=layout)
    out, gradient = check(fast, taken_apart(heads, interleaved), upstream, qkv)
    assert out.is_contiguous(memory_format=layout) and gradient.is_contiguous(memory_format=layout)
    with torch.no_grad():
        assert torch.equal(fast(qkv), out)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "in_turn"])
def test_projection_with_strides(interleaved):
    """Every other pixel of a larger image, every other channel, and an upstream gradient that is expanded."""
    (large,) = draw((2, 48, 8, 8), torch.float32, 1)
    for qkv in (large[:, :24, ::2, ::2], large[:, ::2], large.expand(2, 48, 8, 8)[:1].expand(3, 48, 8, 8)):
        heads = qkv.shape[1] // 12
        upstream = torch.ones(()).expand(qkv.shape[0], 4 * heads, *qkv.shape[2:])

        def fast(x, heads=heads):
            return functional.projected_attention(x, heads, interleaved=interleaved)

        check(fast, taken_apart(heads, interleaved), upstream, qkv)


def test_the_forms_agree():
    """A published network's qkv, and the same projection with its rows in turn."""
    heads, channels = 2, 6
    (qkv,) = draw((2, 3 * heads * channels, 3, 3), torch.float32, 1)
    in_turn = qkv.unflatten(1, (heads * channels, 3)).transpose(1, 2).flatten(1, 2)
    want = functional.projected_attention(qkv, heads)
    assert torch.equal(functional.projected_attention(in_turn, heads, interleaved=False), want)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_projection_of_an_empty_batch(layout):
    qkv = torch.empty(0, 24, 4, 4).contiguous(memory_format=layout).requires_grad_()
    out = functional.projected_attention(qkv, 2)
    assert out.shape == (0, 8, 4, 4)
    with torch.no_grad():
        assert functional.projected_attention(qkv, 2).shape == out.shape
    assert torch.autograd.grad(out, qkv, torch.ones_like(out))[0].shape == qkv.shape


# ---- float64, second derivatives, errors ----


def test_float64_takes_the_plain_form():
    q, k, v = (t.requires_grad_() for t in draw((1, 2, 5, 3), torch.float64, 3))
    before = dispatch.taken["attention", "flash"]
    assert str(op.supports(q, 3)) == "float64 is for checking only"
    assert torch.autograd.gradcheck(functional.attention, (q, k, v))
    for interleaved, layout in PROJECTIONS:
        (qkv,) = draw((2, 12, 2, 3), torch.float64, 1)
        qkv = qkv.contiguous(memory_format=layout).requires_grad_()

        def projected(x, interleaved=interleaved):
            return functional.projected_attention(x, 2, interleaved=interleaved)

        assert torch.autograd.gradcheck(projected, (qkv,))
        assert torch.allclose(projected(qkv), taken_apart(2, interleaved)(qkv), atol=1e-12)
    assert dispatch.taken["attention", "flash"] == before


def test_second_derivatives():
    """The gradient of a squared gradient, as a gradient penalty takes it."""
    q, k, v, upstream = draw((1, 2, 9, 8), torch.float32)

    def penalty(q, k, v, function=functional.attention):
        gradients = torch.autograd.grad(function(q, k, v), (q, k, v), upstream.to(q.dtype), create_graph=True)
        return torch.stack([g.square().sum() for g in gradients])

    def plain(q, k, v):
        return penalty(q, k, v, reference.attention)

    check(penalty, plain, torch.ones(3), q, k, v)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: functional.attention(x, x[:, 1:], x[:, 1:]), "one shape"),
        (lambda x: functional.attention(x[0], x[0], x[0]), "one shape"),
        (lambda x: functional.attention(x, x, x.double()), "one dtype"),
        (lambda x: functional.projected_attention(x, 1), r"qkv must be \(B, 3·1·d, H, W\)"),
        (
            lambda x: functional.projected_attention(x[..., None], 5),
            r"qkv must be \(B, 3·5·d, H, W\), not \(2, 12, 8, 1\)",
        ),
        (lambda x: functional.projected_attention(x[..., None], 0), "qkv must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 12, 8))


def test_first_derivatives_of_arguments_that_depend_on_each_other():
    x = torch.randn(2, 2, 8, 16, requires_grad=True)
    for arguments in ((x, x, x), (x, 2 * x, x.sin())):
        (got,) = torch.autograd.grad(functional.attention(*arguments).square().sum(), x, create_graph=True)
        (want,) = torch.autograd.grad(reference.attention(*arguments).square().sum(), x)
        assert torch.allclose(got, want, atol=1e-5)


def test_second_derivatives_where_some_arguments_want_none():
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    q.requires_grad_()
    (first,) = torch.autograd.grad(functional.attention(q, k, v).sin().sum(), q, create_graph=True)
    (got,) = torch.autograd.grad(first.square().sum(), q)
    wide = q.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(
        reference.attention(wide, k.double(), v.double()).sin().sum(), wide, create_graph=True
    )
    (want,) = torch.autograd.grad(first.square().sum(), wide)
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_no_tokens():
    assert functional.attention(*torch.empty(3, 2, 0, 8).requires_grad_()).shape == (2, 0, 8)
    qkv = torch.empty(2, 24, 0, 4, requires_grad=True)
    y = functional.projected_attention(qkv, 2)
    assert y.shape == (2, 8, 0, 4)
    assert torch.autograd.grad(y.sum(), qkv)[0].shape == qkv.shape


def test_forward_mode_and_function_transforms():
    q, k, v, t = torch.randn(4, 2, 6, 8)

    def run(q):
        return functional.attention(q, k, v)

    _, tangent = torch.func.jvp(run, (q,), (t,))
    eps = 1e-3
    wide = [x.double() for x in (q, k, v, t)]
    numeric = (
        reference.attention(wide[0] + eps * wide[3], wide[1], wide[2])
        - reference.attention(wide[0] - eps * wide[3], wide[1], wide[2])
    ) / (2 * eps)
    assert torch.allclose(tangent.double(), numeric, atol=1e-4) and tangent.abs().max() > 0.01
    leaf = q.clone().requires_grad_()
    got = torch.func.grad(lambda q: run(q).square().sum())(q)
    assert torch.allclose(got, torch.autograd.grad(run(leaf).square().sum(), leaf)[0], atol=1e-5)


def test_autocast_does_not_narrow_the_plain_form():
    q, k, v = torch.randn(3, 2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.attention(q, k, v)
    assert torch.equal(inside, reference.attention(q, k, v))

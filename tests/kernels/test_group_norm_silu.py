"""GroupNorm–SiLU in C++ against float64, beside plain torch in the same dtype."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from sign_fast import functional
from sign_fast.kernels import dispatch, extension
from sign_fast.kernels.group_norm_silu import reference

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, channels, groups, height, width): 1 to 48 channels a group, odd counts, one pixel, widths off every vector
SHAPES = [
    (2, 24, 6, 8, 8),
    (3, 7, 7, 5, 3),
    (2, 384, 32, 9, 9),
    (1, 130, 26, 1, 1),
    (2, 48, 1, 4, 4),
    (2, 15, 5, 7, 1),
    (1, 1, 1, 32, 32),
    (2, 576, 32, 6, 6),
    (0, 24, 6, 8, 8),
]


def plain(x, groups, weight, bias, eps, emb, scale, shift, silu):
    """What a network would do in ordinary torch, every step in x's dtype."""
    d = x.dtype
    if emb is not None:
        x = x + emb.to(d)[:, :, None, None]
    y = F.group_norm(x, groups, None if weight is None else weight.to(d), None if bias is None else bias.to(d), eps)
    if scale is not None:
        y = y * (1 + scale.to(d)[:, :, None, None])
    if shift is not None:
        y = y + shift.to(d)[:, :, None, None]
    return F.silu(y) if silu else y


def bound(want, base, dtype):
    """Twice plain torch's error, and never less than four roundings of the largest value, where plain was lucky."""
    scale = want.abs().max()
    return 2 * (base.double() - want).abs().max() + 4 * torch.finfo(dtype).eps * scale


def case(shape, dtype, channels_last, seed=0):
    batch, channels, _, height, width = shape
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(batch, channels, height, width, generator=g) * 3 + 1).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=g)
    emb, scale, shift = torch.randn(3, batch, channels, generator=g)
    return x, weight, bias, emb, scale, shift


@needs_extension
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, channels_last):
    x, weight, bias, emb, scale, shift = case(shape, dtype, channels_last)
    groups = shape[2]
    for use_affine, use_emb, use_adaptive, silu in itertools.product([True, False], repeat=4):
        args = [
            groups,
            weight if use_affine else None,
            bias if use_affine else None,
            1e-5,
            emb if use_emb else None,
            scale if use_adaptive else None,
            shift if use_adaptive else None,
        ]
        before = dispatch.taken["group_norm_silu", "cpp"]
        with torch.no_grad():
            got = functional.group_norm_silu(
                x, *args[:4], emb=args[4], scale=args[5], shift=args[6], activation="silu" if silu else None
            )
        assert dispatch.taken["group_norm_silu", "cpp"] == before + 1
        assert got.dtype == dtype and got.shape == x.shape
        assert got.stride() == torch.empty_like(x).stride()
        if x.numel() == 0:
            continue
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
        want = reference.group_norm_silu(x.double(), *wide, silu)
        assert (got.double() - want).abs().max() <= bound(want, plain(x.contiguous(), *args, silu), dtype)


@needs_extension
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_residual_against_float64(shape, dtype, channels_last):
    x, weight, bias, *_ = case(shape, dtype, channels_last)
    skip = case(shape, dtype, channels_last, seed=1)[0]
    join = case(shape, dtype, channels_last, seed=2)[2]
    for join_bias in (None, join):
        with torch.no_grad():
            r, y = functional.residual_group_norm_silu(x, skip, join_bias, 0.5**0.5, shape[2], weight, bias)
        wide = reference.residual_group_norm_silu(
            *[None if t is None else t.double() for t in (x, skip, join_bias)],
            0.5**0.5,
            shape[2],
            weight.double(),
            bias.double(),
            1e-5,
        )
        total = x + skip if join_bias is None else x + join_bias.to(dtype)[:, None, None] + skip
        base = total * 0.5**0.5
        base_y = plain(base.contiguous(), shape[2], weight, bias, 1e-5, None, None, None, True)
        assert (r.double() - wide[0]).abs().max() <= bound(wide[0], base, dtype)
        assert (y.double() - wide[1]).abs().max() <= bound(wide[1], base_y, dtype)


@needs_extension
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_mean(channels_last):
    # float32 holds 10000 ± 0.1 to 0.001, exactly known here; the norm has to keep what is there
    g = torch.Generator().manual_seed(0)
    x = 10000 + 0.1 * torch.randn(2, 64, 16, 16, generator=g)
    want = F.group_norm(x.double().contiguous(), 8)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with torch.no_grad():
        got = functional.group_norm_silu(x, 8, None, None, activation=None)
    assert (got.double() - want).abs().max() <= 1e-5
    slow = reference.group_norm_silu(x, 8, None, None, 1e-5, silu=False)
    assert (slow.double() - want).abs().max() <= 2e-2  # plain torch in NCHW is at 7e-3


@needs_extension
@pytest.mark.parametrize("channels_last", [False, True])
def test_thread_count_changes_no_bit(channels_last):
    x, weight, bias, emb, *_ = case((3, 256, 32, 32, 32), torch.float32, channels_last)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with torch.no_grad():
                results.append(functional.group_norm_silu(x, 32, weight, bias, emb=emb))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_extension
def test_one_row_and_strided_inputs():
    x, weight, bias, emb, *_ = case((2, 24, 6, 8, 8), torch.float32, False)
    with torch.no_grad():
        one = functional.group_norm_silu(x, 6, weight, bias, emb=emb[:1])
        both = functional.group_norm_silu(x, 6, weight, bias, emb=emb[:1].expand(2, 24).contiguous())
        cut = functional.group_norm_silu(x[:, :, ::2, 1:5], 6, weight, bias)
        whole = functional.group_norm_silu(x[:, :, ::2, 1:5].contiguous(), 6, weight, bias)
    assert torch.equal(one, both)
    assert torch.equal(cut, whole)


@needs_extension
def test_silu_far_from_zero_and_non_finite():
    x = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1, 1)
    for big in (50.0, 90.0, 200.0, 1e30):
        with torch.no_grad():
            y = functional.group_norm_silu(x, 1, torch.full((2,), big), None)
        want = F.silu(F.group_norm(x.double(), 1) * big)
        assert torch.isfinite(y).all()
        assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-30)
    with torch.no_grad():
        y = functional.group_norm_silu(torch.full((1, 4, 3, 3), float("nan")), 2, None, None)
    assert y.isnan().all()


def test_gradients():
    x, weight, bias, emb, scale, shift = (
        t.double().requires_grad_() for t in case((2, 6, 2, 3, 2), torch.float32, False)
    )

    def norm(*t):
        return functional.group_norm_silu(t[0], 2, t[1], t[2], emb=t[3], scale=t[4], shift=t[5])

    assert torch.autograd.gradcheck(norm, (x, weight, bias, emb, scale, shift))
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(norm, (last, weight, bias, emb, scale, shift))

    def join(h, skip, b, w, nb):
        return functional.residual_group_norm_silu(h, skip, b, 0.7, 2, w, nb)

    assert torch.autograd.gradcheck(join, (x, torch.randn_like(x, requires_grad=True), bias, weight, bias))


@needs_extension
def test_operator_registration():
    x, weight, bias, emb, scale, shift = case((2, 24, 6, 8, 8), torch.float32, True)
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.sign_fast
    torch.library.opcheck(op.group_norm_silu, (x, 6, weight, bias, 1e-5, emb, scale, shift, True), test_utils=tests)
    args = (x, x.flip(0), bias, 0.7, 6, weight, bias, 1e-5, True)
    torch.library.opcheck(op.residual_group_norm_silu, args, test_utils=tests)


def test_compiles_without_a_break():
    x, weight, bias, emb, *_ = case((2, 24, 6, 8, 8), torch.float32, True)

    def norm(x, weight, bias, emb):
        return functional.group_norm_silu(x, 6, weight, bias, emb=emb)

    with torch.no_grad():
        compiled = torch.compile(norm, fullgraph=True)(x, weight, bias, emb)
        assert torch.allclose(compiled, norm(x, weight, bias, emb), atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: functional.group_norm_silu(x, 5, None, None), "24 channels do not divide into 5 groups"),
        (lambda x: functional.group_norm_silu(x, 6, torch.ones(3), None), r"must be \(24,\)"),
        (lambda x: functional.group_norm_silu(x, 6, None, None, emb=torch.ones(3, 24)), "emb, scale and shift"),
        (lambda x: functional.group_norm_silu(x, 6, None, None, activation="relu"), "activation must be"),
        (lambda x: functional.group_norm_silu(x[0], 6, None, None), r"x must be \(B, C, H, W\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 24, 4, 4))


def run(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


CALL = """
import torch
from sign_fast import functional
with torch.no_grad():
    for _ in range(3):
        functional.group_norm_silu(torch.ones(1, 4, 2, 2), 2, None, None)
"""


def test_without_the_extension_warns_once_with_the_remedy():
    done = run(CALL, SIGN_FAST_DISABLE_EXT="1")
    assert done.returncode == 0
    assert done.stderr.count("SlowPathWarning") == 1
    assert "SIGN_FAST_DISABLE_EXT=1; unset it" in done.stderr


def test_strict_raises_instead():
    done = run(CALL, SIGN_FAST_DISABLE_EXT="1", SIGN_FAST_STRICT="1")
    assert done.returncode != 0
    assert "SlowPathError: group_norm_silu" in done.stderr


def test_gradients_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.group_norm_silu(torch.ones(1, 4, 2, 2, requires_grad=True), 2, None, None)

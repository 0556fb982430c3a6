"""GroupNorm–SiLU's dispatch: plain torch for float64, errors, compilation, and what is said where C++ is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels import ahead_of_time, extension
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.group_norm_silu import config, launches, op, reference
from sign_fast.kernels.resources import resources
from tests import group_norm_cases as cases
from tests.oracle import assert_close


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_of_the_plain_form(channels_last):
    for second in (0, 1):
        t = (
            cases.make((2, 6, 3, 2), 2, channels_last=channels_last, second=second)
            .to(torch.float64, leaves=True)
            .tensors
        )

        def norm(*values, names=tuple(t)):
            return cases.fast(cases.Inputs(2, dict(zip(names, values, strict=True))))

        assert torch.autograd.gradcheck(norm, tuple(t.values()))
    t = cases.make((2, 6, 3, 2), 2, channels_last=channels_last, folds="skip join_bias weight bias").tensors

    def join(h, skip, bias, weight, norm_bias):
        return functional.residual_group_norm_silu(h, skip, bias, 0.7, 2, weight, norm_bias)

    names = ("x", "skip", "join_bias", "weight", "bias")
    assert torch.autograd.gradcheck(join, tuple(t[name].double().requires_grad_() for name in names))


def test_a_large_mean_in_the_plain_form():
    """channels_last too, where torch's own norm on the CPU takes E[x²] − E[x]²."""
    for channels_last in (True, False):
        inputs = cases.make((2, 64, 16, 16), 8, channels_last=channels_last, folds="", mean=10000, deviation=0.1)
        (want,) = cases.plain(inputs.to(torch.float64))
        got = reference.group_norm_silu(inputs.tensors["x"], None, 8, None, None, cases.EPS)
        assert (got.double() - want).abs().max() <= 2e-2  # plain torch in NCHW is at 7e-3


def test_compiles_without_a_break():
    t = cases.make((2, 24, 8, 8), 6).tensors
    x, weight, bias, emb = t["x"], t["weight"], t["bias"], t["emb"]

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


# ---- launches on the meta device ----


def meta_launches(shape, groups, architecture, dtype=torch.bfloat16, pair=False):
    """Forward and backward in NCHW, with every fold."""
    x = whole = torch.empty(shape, dtype=dtype, device="meta")
    x2 = None
    if pair:
        x = x2 = torch.empty_like(whole[:, : shape[1] // 2])
    stats = torch.empty((shape[0], groups, 3), device="meta")
    row, vector = torch.empty(shape[:2], device="meta"), torch.empty(shape[1], device="meta")
    folds = {"emb": row, "input_bias": vector, "scale": row, "shift": row}
    affine, device = (groups, vector, vector), KNOWN[architecture]
    sums = torch.empty((3, *shape[:2]), device="meta")
    return [
        *launches.launches_forward(x, x2, whole, stats, *affine, 1e-5, device, **folds),
        *launches.launches_backward(whole, x, x2, x, x2, sums, stats, *affine, device, **folds, input_sum=True),
    ]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    "shape, groups, pair",
    [
        ((512, 2048, 2, 2), 2048, True),
        ((512, 512, 4, 4), 512, False),
        ((512, 256, 8, 8), 256, False),
        ((512, 512, 8, 8), 64, True),
        ((512, 1536, 4, 4), 32, False),
        ((2, 2048, 16, 16), 1, False),
    ],
)
def test_many_groups_do_not_spill(shape, groups, pair, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in meta_launches(shape, groups, architecture, pair=pair):
        assert resources(ahead_of_time.compile(launch, architecture)).spilled_bytes == 0


@pytest.mark.parametrize("channels_last", [True, False])
def test_every_bundle_is_whole_groups_and_bounded(channels_last):
    for channels, groups in [(2048, 2048), (2053, 2053), (6159, 2053), (4096, 512), (4096, 1), (8192, 4096), (504, 8)]:
        for pixels in (1, 4, 64, 4096):
            call = config.Call(64, channels, pixels, groups, 2, channels_last)
            plan, group = config.plan(call, KNOWN[90]), channels // groups
            assert channels % plan.bundle == 0 and plan.bundle % group == 0
            table = plan.block_channels * config.power_of_two(plan.bundle // group)
            assert table <= config.MEMBERS or plan.bundle == group or (group == 1 and plan.bundle <= 512)


def test_a_tuned_plan_replaces_the_rule(monkeypatch):
    """Even for a call that was planned before."""
    call, device = config.Call(4, 64, 64, 8, 2, True), KNOWN[90]
    rule = config.plan(call, device)
    tuned = config.Plan("loop", 64, 64, 8, 64, 2)
    monkeypatch.setitem(config.TUNED, device.name, {replace(call, batch=0): tuned})
    assert config.plan(call, device) == tuned != rule
    assert config.plan(call, KNOWN[80]) != tuned
    monkeypatch.undo()
    assert config.plan(call, device) == rule


@pytest.mark.parametrize("stride", [(8, 1, 2**30, 2**30), (0, 2**29, 4, 1)])
def test_steps_that_leave_int32_are_copied(stride):
    """Strided by hand: no such memory is needed."""
    x = torch.empty_strided((1, 8, 1, 4), stride, device="meta")
    assert x.stride() == stride
    ours = launches.readable(x)
    assert ours is not x and ours.untyped_storage().nbytes() == 4 * x.numel()
    near = torch.empty_strided((1, 8, 1, 4), (8, 1, 2**29, 2**29), device="meta")
    assert launches.readable(near) is near
    row = torch.empty_strided((3, 8), (2**30, 1), device="meta")
    assert launches.rows(row).stride() == (8, 1)


def test_samples_too_large_for_int32_have_a_reason():
    def reason(*shape):
        return launches.shape_reason(torch.empty(shape, device="meta"), None, 1)

    assert reason(4, 8, 1, 2**28 - 2**14) is None
    assert "one sample" in str(reason(1, 8, 1, 2**28 - 2**13))
    assert "samples times channels" in str(reason(2**28, 8, 1, 1))


# ---- the plain form ----


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("shape, groups", [((2, 6, 3, 2), 2), ((2, 4, 1, 1), 4), ((1, 1, 1, 1), 1)])
@pytest.mark.parametrize(
    "folds, leaves",
    [("bias", "bias"), ("bias", "x"), ("weight", "weight"), ("weight bias", "weight"), ("weight bias", "x")],
)
def test_plain_form_takes_every_combination(folds, leaves, shape, groups, channels_last):
    """A bias without a weight, an x without a gradient, one value a group."""
    t = cases.make(shape, groups, torch.float64, channels_last=channels_last, folds=folds).tensors
    t[leaves].requires_grad_()
    y = functional.group_norm_silu(t["x"], groups, t.get("weight"), t.get("bias"), cases.EPS)
    u = t["x"].reshape(shape[0], groups, -1)
    u = (u - u.mean(2, keepdim=True)) / (u.var(2, unbiased=False, keepdim=True) + cases.EPS).sqrt()
    want = u.reshape(shape)
    want = want * t["weight"].reshape(-1, 1, 1) if "weight" in t else want
    want = torch.nn.functional.silu(want + t["bias"].reshape(-1, 1, 1) if "bias" in t else want)
    assert torch.allclose(y, want)
    dy = torch.arange(y.numel(), dtype=y.dtype).reshape(shape)
    got, expected = (torch.autograd.grad(out, t[leaves], dy)[0] for out in (y, want))
    assert torch.allclose(got, expected, atol=1e-9)


def test_autocast_does_not_change_the_plain_form():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        t = cases.make((2, 24, 4, 4), 6, dtype, second=8).tensors
        arguments = (t["x"], t["x2"], 6, t["weight"], t["bias"], cases.EPS, t["emb"], t["input_bias"], t["scale"])
        want = reference.group_norm_silu(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = reference.group_norm_silu(*arguments)
        assert got.dtype == dtype and torch.equal(got, want)


def test_parameter_gradients_are_no_views():
    sums, row, vector = torch.randn(3, 2, 8), torch.randn(2, 8), torch.randn(8)
    for weight in (vector, None):
        for bias in (vector, None):
            for scale in (row, None):
                torch.library.opcheck(
                    torch.ops.sign_fast.group_norm_silu_parameter_gradients, (sums, weight, bias, scale)
                )


# ---- devices, dtypes, the residual stream alone ----


def test_tensors_on_two_devices():
    x, row, vector = torch.ones(2, 8, 4, 4), torch.ones(2, 8), torch.ones(8)
    calls = [
        lambda: functional.group_norm_silu(x, 2, vector.to("meta"), None),
        lambda: functional.group_norm_silu(x, 2, None, None, emb=row.to("meta")),
        lambda: functional.group_norm_silu((x, x.to("meta")), 2, None, None),
        lambda: functional.residual_group_norm_silu(x, x.to("meta"), None, 1.0, 2, None, None),
        lambda: functional.residual_group_norm_silu(x, x, None, 1.0, 2, None, vector.to("meta")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="one device, not on cpu and meta"):
            call()


def test_two_dtypes_are_promoted():
    """As torch.cat and + do; under autocast a convolution's output meets a float32 skip."""
    x, skip = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(2, 8, 4, 4).requires_grad_()
    y = functional.group_norm_silu((x, skip), 2, None, None)
    assert torch.equal(y, functional.group_norm_silu(torch.cat([x, skip], 1), 2, None, None))
    assert y.dtype == torch.float32
    h = x.clone().requires_grad_()
    r, y = functional.residual_group_norm_silu(h, skip, None, 1.0, 2, None, None)
    want = functional.residual_group_norm_silu(x.float(), skip, None, 1.0, 2, None, None)
    assert torch.equal(r, want[0]) and torch.equal(y, want[1])
    found = torch.autograd.grad(y.square().sum(), (h, skip))
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    half = torch.randn(2, 8, 4, 4).half()
    assert functional.residual_group_norm_silu(x, half, None, 1.0, 2, None, None)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("twice", [False, True])
def test_the_residual_stream_alone_passes_no_norm(dtype, twice, monkeypatch):
    if extension.missing() is not None:
        pytest.skip(str(extension.missing()))
    called = []
    plainly = op.call
    monkeypatch.setattr(op, "call", lambda name, *others: called.append(name) or plainly(name, *others))
    inputs = cases.make((2, 24, 5, 3), 6, dtype, folds="skip join_bias weight bias")
    names = ["x", "skip", "join_bias"]

    def derivatives(run, inputs):
        r = run(inputs)[0]
        leaves = [inputs.tensors[name] for name in names]
        dr = torch.arange(r.numel(), dtype=torch.float32).reshape(r.shape).cos().to(r.dtype)
        return torch.autograd.grad(r, leaves, dr, create_graph=twice)

    wide, ordinary, ours = inputs.to(torch.float64, leaves=True), inputs.to(leaves=True), inputs.to(leaves=True)
    results = [derivatives(*each) for each in ((cases.plain, wide), (cases.plain, ordinary), (cases.fast, ours))]
    for name, want, base, got in zip(names, *results, strict=True):
        assert_close(got, want, base, name, results[0][0])
    assert called == ["residual_group_norm_silu_forward"]

"""The Triton kernels of GroupNorm–SiLU against float64, beside plain torch: values and every gradient."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels import dispatch
from sign_fast.kernels.group_norm_silu import config
from tests import group_norm_cases as cases
from tests.oracle import TRITON_DEVICE, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(inputs: cases.Inputs, backward: bool = True) -> None:
    """Rule 1 for the outputs and, where wanted, for every gradient."""
    wide = inputs.to(torch.float64, leaves=backward)
    ordinary = inputs.to(leaves=backward)
    ours = inputs.to(device=TRITON_DEVICE, leaves=backward)
    before = dispatch.taken.total()
    results = [cases.plain(wide), cases.plain(ordinary), cases.fast(ours)]
    assert dispatch.taken.total() == before + 1
    for want, base, got in zip(*results, strict=True):
        assert_close(got, want, base, "output")
        assert got.is_contiguous(
            memory_format=torch.channels_last if ours.tensors["x"].stride(1) == 1 else torch.contiguous_format
        )
    if backward:
        found = [
            cases.gradients(outputs, inputs) for outputs, inputs in zip(results, (wide, ordinary, ours), strict=True)
        ]
        for name in found[0]:
            # these are sums of x's gradient over the pixels, which cancel
            terms = found[0]["x"] if name in ("emb", "input_bias", "join_bias") else None
            assert_close(found[2][name], found[0][name], found[1][name], name, terms)


@pytest.fixture
def strategy(monkeypatch):
    """Forces a strategy on shapes that would otherwise fit on chip: strategy("loop"), strategy("split")."""

    def force(name: str) -> None:
        taken = []
        rule = config.plan

        def plan(call, device):
            chosen = rule(call, device)
            step = min(16, chosen.block_pixels)
            span = 2 * step if name == "split" else call.pixels
            chosen = config.Plan(name, chosen.bundle, chosen.block_channels, step, span, 4)
            taken.append(chosen)
            return chosen

        monkeypatch.setattr("sign_fast.kernels.group_norm_silu.launches.plan", plan)
        return taken

    return force


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("channels", [128, 256, 384, 512, 576, 960])
def test_every_fold(channels, channels_last, dtype):
    check(cases.make((2, channels, 4, 4), 32, dtype, channels_last=channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "channels, second", [(384, 128), (384, 129), (512, 256), (576, 192), (960, 384), (24, 1)], ids=str
)
def test_two_tensors_read_as_concatenated(channels, second, dtype):
    """12 channels a group at 384: the seam at 256 cuts through a group."""
    groups = 32 if channels % 32 == 0 else 6
    check(cases.make((2, channels, 4, 4), groups, dtype, second=second))
    check(cases.make((1, channels, 3, 5), groups, dtype, second=second, channels_last=False, silu=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("channels", [128, 384, 576])
def test_residual_join(channels, channels_last, dtype):
    folds = "skip join_bias weight bias"
    check(cases.make((2, channels, 4, 4), 32, dtype, channels_last=channels_last, folds=folds))
    check(cases.make((1, channels, 3, 3), 32, dtype, channels_last=channels_last, folds="skip", skip_scale=1.0))


@pytest.mark.parametrize("name", ["loop", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["folds", "pair", "residual", "nchw"])
def test_samples_that_do_not_fit_on_chip(name, kind, dtype, strategy):
    plans = strategy(name)
    options = {
        "folds": {},
        "pair": {"second": 32},
        "residual": {"folds": "skip join_bias weight bias"},
        "nchw": {"channels_last": False},
    }[kind]
    check(cases.make((2, 96, 7, 7), 8, dtype, **options))
    assert plans and all(plan.strategy == name for plan in plans)


@pytest.mark.parametrize("channels, size", [(128, 32), (256, 32), (384, 32), (512, 32), (256, 16), (512, 16), (512, 8)])
def test_production_shapes(channels, size):
    """The CIFAR networks' shapes as the rule runs them."""
    check(cases.make((1, channels, size, size), 32, torch.bfloat16, folds="weight bias emb"))


@pytest.mark.parametrize("channels, size", [(128, 64), (192, 64), (1344, 16), (1536, 8), (320, 32)])
def test_other_published_shapes(channels, size):
    check(cases.make((1, channels, size, size), 32, torch.float16, folds="weight bias scale shift"), backward=size < 64)


@pytest.mark.parametrize("name", [None, "loop", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
def test_a_large_mean_keeps_the_digits(channels_last, dtype, name, strategy):
    if name:
        strategy(name)
    inputs = cases.make(
        (2, 64, 8, 8), 16, dtype, channels_last=channels_last, mean=10000, deviation=0.1, folds="weight bias"
    )
    check(inputs)
    if dtype == torch.float32:
        wide, ours = inputs.to(torch.float64), inputs.to(device=TRITON_DEVICE)
        (want,), (got,) = cases.plain(wide), cases.fast(ours)
        assert (got.double().cpu() - want).abs().max() < 1e-5 * want.abs().max()


def test_constant_input_gives_the_bias():
    x = torch.full((2, 32, 4, 4), 3.25, device=TRITON_DEVICE).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(32, device=TRITON_DEVICE)
    y = functional.group_norm_silu(x, 8, None, bias, activation=None)
    assert torch.equal(y, bias.reshape(1, -1, 1, 1).expand_as(y))


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("name", [None, "loop", "split"])
def test_a_channel_a_group_and_a_single_group(name, channels_last, strategy):
    if name:
        strategy(name)
    for channels, groups in ((18, 18), (72, 1)):
        check(cases.make((1, channels, 5, 4), groups, torch.bfloat16, channels_last=channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_stream_alone(dtype):
    """Its gradients where the norm's output is not used, and where only that is used."""
    inputs = cases.make((2, 24, 5, 3), 6, dtype, folds="skip join_bias weight bias")
    for place in (0, 1):

        def derivatives(run, inputs, place=place):
            out, dy = run(inputs)[place], torch.arange(2 * 24 * 15).reshape(2, 24, 5, 3).cos()
            leaves = [inputs.tensors[name] for name in ("x", "skip", "join_bias")]
            return torch.autograd.grad(out, leaves, dy.to(dtype).to(out))

        want = derivatives(cases.plain, inputs.to(torch.float64, leaves=True))
        base = derivatives(cases.plain, inputs.to(leaves=True))
        got = derivatives(cases.fast, inputs.to(device=TRITON_DEVICE, leaves=True))
        for triple in zip(got, want, base, strict=True):
            assert_close(*triple, terms=want[0])


@pytest.mark.parametrize("shape, groups", [((3, 24, 1, 1), 6), ((2, 5, 1, 7), 1), ((1, 1, 1, 1), 1), ((2, 7, 5, 1), 7)])
def test_single_pixels_and_narrow_planes(shape, groups):
    for channels_last in (True, False):
        check(cases.make(shape, groups, torch.float32, channels_last=channels_last))


def test_empty_batch():
    x = torch.empty(0, 32, 4, 4, device=TRITON_DEVICE, requires_grad=True)
    weight = torch.ones(32, device=TRITON_DEVICE, requires_grad=True)
    y = functional.group_norm_silu(x, 8, weight, None)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_that_every_sample_shares_and_views():
    """(1, C) rows, halves of one projection, channels of a wider tensor, parameters in the activations' type."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 96, 5, 5, generator=g).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    both = torch.randn(3, 128, generator=g).to(torch.bfloat16)
    scale, shift = both.chunk(2, dim=1)
    one = torch.randn(1, 64, generator=g).to(torch.bfloat16)
    inputs = cases.Inputs(16, {"x": wide[:, 16:80], "scale": scale, "shift": shift, "emb": one})
    ours = inputs.to(device=TRITON_DEVICE)
    if TRITON_DEVICE == "cpu":
        ours.tensors = inputs.tensors  # the views themselves
    (want,), (base,), (got,) = cases.plain(inputs.to(torch.float64)), cases.plain(inputs), cases.fast(ours)
    assert_close(got, want, base)
    check(inputs)


def test_samples_do_not_depend_on_their_batch():
    inputs = cases.make((4, 64, 8, 8), 16, torch.bfloat16).to(device=TRITON_DEVICE)
    (whole,) = cases.fast(inputs)
    alone = cases.Inputs(16, {name: t[2:3] if t.shape[0] == 4 else t for name, t in inputs.tensors.items()})
    assert torch.equal(cases.fast(alone)[0], whole[2:3])


def test_two_runs_are_equal_to_the_bit():
    inputs = cases.make((3, 96, 7, 7), 8, torch.float32).to(device=TRITON_DEVICE, leaves=True)
    first, second = (cases.gradients(cases.fast(inputs), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("folds", ["weight bias emb scale shift", "skip join_bias weight bias"])
def test_second_derivatives_are_right(folds):
    inputs = cases.make((2, 8, 3, 3), 2, torch.float32, folds=folds)

    def second(run, inputs):
        first = cases.gradients(run(inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first.values()), inputs.tensors["x"])[0]

    want = second(cases.plain, inputs.to(torch.float64, leaves=True))
    base = second(cases.plain, inputs.to(leaves=True))
    got = second(cases.fast, inputs.to(device=TRITON_DEVICE, leaves=True))
    assert_close(got, want, base)


@pytest.mark.skipif(TRITON_DEVICE != "cuda", reason="needs the memory of a GPU")
def test_offsets_beyond_two_to_the_31():
    x = torch.randn(2**31 // (256 * 1024) + 3, 256, 32, 32, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    y = functional.group_norm_silu(x, 32, None, None)
    assert torch.equal(
        y[-2:], functional.group_norm_silu(x[-2:].clone(memory_format=torch.preserve_format), 32, None, None)
    )

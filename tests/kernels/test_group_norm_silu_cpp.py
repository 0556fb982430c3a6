"""GroupNorm–SiLU in C++ against float64, beside plain torch in the same dtype: values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sign_fast import functional
from sign_fast.kernels import dispatch, extension
from sign_fast.kernels.group_norm_silu import reference
from tests import group_norm_cases as cases
from tests.lesser_cpu import run_on
from tests.oracle import assert_close

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(inputs: cases.Inputs, backward: bool = True) -> None:
    """Rule 1 for the outputs and, where wanted, for every gradient."""
    wide = inputs.to(torch.float64, leaves=backward)
    ordinary = inputs.to(leaves=backward)
    ours = inputs.to(leaves=backward)
    name = ("residual_group_norm_silu" if "skip" in inputs.tensors else "group_norm_silu", "cpp")
    before = dispatch.taken[name]
    results = [cases.plain(wide), cases.plain(ordinary), cases.fast(ours)]
    assert dispatch.taken[name] == before + 1
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


@EACH_DTYPE
@LAYOUTS
@pytest.mark.parametrize("channels", [128, 256, 384, 512, 576, 960])
def test_channels_of_the_published_networks(channels, channels_last, dtype):
    check(cases.make((2, channels, 4, 4), 32, dtype, channels_last=channels_last))


@EACH_DTYPE
@LAYOUTS
def test_every_fold_alone_and_none(channels_last, dtype):
    for folds in ("", "weight", "weight bias", "emb", "input_bias", "scale", "shift", "weight bias emb"):
        for silu in (True, False):
            check(cases.make((2, 24, 5, 3), 6, dtype, channels_last=channels_last, folds=folds, silu=silu))


@EACH_DTYPE
@LAYOUTS
@pytest.mark.parametrize(
    "channels, second", [(384, 128), (384, 129), (512, 256), (576, 192), (960, 384), (24, 1), (24, 23)], ids=str
)
def test_two_tensors_read_as_concatenated(channels, second, channels_last, dtype):
    """12 channels a group at 384: the seam at 256 cuts through a group."""
    groups = 32 if channels % 32 == 0 else 6
    check(cases.make((2, channels, 4, 4), groups, dtype, second=second, channels_last=channels_last))
    folds = "weight bias"  # without an embedding a group is one long run a tensor in NCHW
    inputs = cases.make((1, channels, 3, 5), groups, dtype, second=second, channels_last=channels_last, folds=folds)
    check(inputs)


@LAYOUTS
def test_a_bias_without_a_weight(channels_last):
    """Which torch's own backward does not take: as with a weight of ones."""
    inputs = cases.make((2, 24, 5, 3), 6, channels_last=channels_last, folds="bias").to(leaves=True)
    ones = cases.Inputs(6, {**inputs.tensors, "weight": torch.ones(24)})
    (alone,), (both,) = cases.fast(inputs), cases.fast(ones)
    assert torch.equal(alone, both)
    got, want = (cases.gradients((y,), inputs) for y in (alone, both))
    assert torch.equal(got["x"], want["x"]) and torch.equal(got["bias"], want["bias"])


def test_a_pair_in_two_layouts():
    inputs = cases.make((2, 48, 5, 5), 8, second=20)
    inputs.tensors["x2"] = inputs.tensors["x2"].contiguous()
    check(inputs)
    inputs.tensors["x"] = inputs.tensors["x"].contiguous()
    inputs.tensors["x2"] = inputs.tensors["x2"].contiguous(memory_format=torch.channels_last)
    check(inputs)


def test_a_pair_equals_its_concatenation_to_the_bit():
    """Where the seam lies between bundles the same sums are taken in the same order."""
    inputs = cases.make((2, 256, 6, 6), 32, torch.bfloat16, second=128)
    joined = {name: t for name, t in inputs.tensors.items() if name not in ("x", "x2")}
    x = torch.cat([inputs.tensors["x"], inputs.tensors["x2"]], dim=1)
    assert torch.equal(cases.fast(inputs)[0], cases.fast(cases.Inputs(32, {"x": x, **joined}))[0])


@EACH_DTYPE
@LAYOUTS
@pytest.mark.parametrize("channels", [7, 128, 384, 576])
def test_residual_join(channels, channels_last, dtype):
    groups = 7 if channels == 7 else 32
    folds = "skip join_bias weight bias"
    check(cases.make((2, channels, 4, 4), groups, dtype, channels_last=channels_last, folds=folds))
    check(
        cases.make((1, channels, 3, 3), groups, dtype, channels_last=channels_last, folds="skip weight", skip_scale=1.0)
    )


@pytest.mark.parametrize("output", [0, 1], ids=["r", "y"])
def test_residual_join_of_which_one_output_is_used(output):
    """The other gradient is None; skip_scale then still counts."""
    inputs = cases.make((2, 16, 4, 4), 4, folds="skip join_bias weight bias")
    kept = "x skip join_bias weight bias" if output else "x skip join_bias"
    found = []
    for run, dtype in ((cases.plain, torch.float64), (cases.plain, None), (cases.fast, None)):
        leaves = inputs.to(dtype, leaves=True)
        outputs = (run(leaves)[output],)
        leaves.tensors = {name: leaves.tensors[name] for name in kept.split()}
        found.append(cases.gradients(outputs, leaves))
    for name in found[0]:
        assert_close(found[2][name], found[0][name], found[1][name], name, found[0]["x"])


@EACH_DTYPE
@pytest.mark.parametrize("channels, size", [(128, 32), (384, 16), (512, 8)])
def test_production_shapes(channels, size, dtype):
    check(cases.make((1, channels, size, size), 32, dtype, folds="weight bias emb"))
    check(cases.make((1, channels, size, size), 32, dtype, folds="weight bias input_bias", channels_last=False))


@EACH_DTYPE
@LAYOUTS
def test_a_large_mean_keeps_the_digits(channels_last, dtype):
    options = {"channels_last": channels_last, "mean": 10000, "deviation": 0.1, "folds": "weight bias"}
    inputs = cases.make((2, 64, 8, 8), 16, dtype, **options)
    check(inputs)
    check(cases.make((2, 64, 8, 8), 16, dtype, second=10, **options))
    if dtype == torch.float32:
        (want,), (got,) = cases.plain(inputs.to(torch.float64)), cases.fast(inputs)
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@LAYOUTS
def test_a_large_mean_keeps_the_gradients_digits(channels_last, dtype):
    """Plain torch loses them, so that rule 1 would allow much: 1e-5 of the largest, or what the type holds."""
    inputs = cases.make(
        (2, 64, 8, 8), 16, dtype, channels_last=channels_last, mean=10000, deviation=0.1, folds="weight bias"
    )
    if dtype == torch.bfloat16:  # whose steps at 10000 are 64
        inputs.tensors["x"] = inputs.tensors["x"] + 256 * (torch.arange(8) % 2).to(dtype)
    wide, ours = inputs.to(torch.float64, leaves=True), inputs.to(leaves=True)
    want, got = cases.gradients(cases.plain(wide), wide), cases.gradients(cases.fast(ours), ours)
    for name in want:
        limit = max(1e-5, 2 * torch.finfo(got[name].dtype).eps) * want[name].abs().max()
        assert (got[name].double() - want[name]).abs().max() < limit, name


@LAYOUTS
def test_constant_input(channels_last):
    x = torch.full((2, 32, 4, 4), 3.25)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    bias = torch.randn(32, generator=torch.Generator().manual_seed(0))
    y = functional.group_norm_silu(x, 8, None, bias, activation=None)
    assert torch.equal(y, bias.reshape(1, -1, 1, 1).expand_as(y))
    x.requires_grad_()
    weight = torch.ones(32, requires_grad=True)
    functional.group_norm_silu(x, 8, weight, bias).square().sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(weight.grad, torch.zeros(32))


@pytest.mark.parametrize("shape, groups", [((3, 24, 1, 1), 6), ((2, 5, 1, 7), 1), ((1, 1, 1, 1), 1), ((2, 7, 5, 1), 7)])
@EACH_DTYPE
def test_single_pixels_and_narrow_planes(shape, groups, dtype):
    for channels_last in (True, False):
        check(cases.make(shape, groups, dtype, channels_last=channels_last))


@EACH_DTYPE
@LAYOUTS
@pytest.mark.parametrize(
    "shape, groups, second",
    [
        ((3, 7, 5, 3), 7, 3),
        ((2, 15, 7, 1), 5, 14),
        ((1, 130, 3, 3), 26, 61),
        ((2, 48, 9, 7), 1, 7),
        ((1, 1, 32, 32), 1, 0),
    ],
    ids=str,
)
def test_odd_sizes(shape, groups, second, channels_last, dtype):
    check(cases.make(shape, groups, dtype, channels_last=channels_last, second=second))
    check(cases.make(shape, groups, dtype, channels_last=channels_last, folds="weight bias"))


@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4)], ids=str)
def test_nothing_in_it(shape):
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    y = functional.group_norm_silu(x, 8, weight, None)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_that_every_sample_shares_and_views():
    """(1, C) rows, halves of one projection, channels of a wider tensor, parameters in the activations' type."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 96, 5, 5, generator=g).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(3, 128, generator=g).to(torch.bfloat16).chunk(2, dim=1)
    one = torch.randn(1, 64, generator=g).to(torch.bfloat16)
    rows = {"scale": scale, "shift": shift, "emb": one}
    check(cases.Inputs(16, {"x": wide[:, 16:80], **rows}))
    check(cases.Inputs(16, {"x": wide[:, :40], "x2": wide[:, 72:], **rows}))
    check(cases.Inputs(16, {"x": wide.contiguous()[:, 16:80, ::2, 1:4], **rows}))


@LAYOUTS
def test_thread_count_changes_no_bit(channels_last):
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for options in ({"second": 100}, {"folds": "skip join_bias weight bias"}):
                inputs = cases.make((3, 256, 16, 16), 32, channels_last=channels_last, **options).to(leaves=True)
                outputs = cases.fast(inputs)
                found.append([*outputs, *cases.gradients(outputs, inputs).values()])
    finally:
        torch.set_num_threads(threads)
    for later in (2, 4):
        for one, many in zip(found[0] + found[1], found[later] + found[later + 1], strict=True):
            assert torch.equal(one, many)


def test_samples_do_not_depend_on_their_batch():
    inputs = cases.make((4, 64, 8, 8), 16, torch.bfloat16)
    (whole,) = cases.fast(inputs)
    alone = cases.Inputs(16, {name: t[2:3] if t.shape[0] == 4 else t for name, t in inputs.tensors.items()})
    assert torch.equal(cases.fast(alone)[0], whole[2:3])


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_sums_are_those_of_the_reference(channels_last, dtype):
    t = cases.make((2, 48, 5, 7), 4, dtype, channels_last=channels_last, second=9, mean=300).tensors
    x, x2, weight, bias, emb, input_bias, scale, shift = (
        t[name] for name in ["x", "x2", "weight", "bias", "emb", "input_bias", "scale", "shift"]
    )
    op = torch.ops.sign_fast
    y, stats = op.group_norm_silu_forward(x, x2, 4, weight, bias, 1e-5, emb, input_bias, scale, shift, True)
    assert torch.equal(y, op.group_norm_silu(x, x2, 4, weight, bias, 1e-5, emb, input_bias, scale, shift, True))
    wide = [None if v is None else v.double() for v in (x, x2, weight, bias, emb, input_bias, scale, shift)]
    want = reference.statistics(wide[0], wide[1], 4, 1e-5, wide[4], wide[5])
    assert stats.dtype == torch.float32
    assert torch.allclose(stats.double()[..., :2].sum(2), want[..., :2].sum(2), rtol=1e-7, atol=0)
    assert torch.allclose(stats.double()[..., 2], want[..., 2], rtol=1e-6, atol=0)

    g = torch.Generator().manual_seed(3)
    dy, stream = (torch.randn(y.shape, generator=g).to(dtype) for _ in range(2))  # dense in NCHW whatever x is
    for wants_sum in (False, True):
        rest = (4, *wide[2:], True)
        want = reference.group_norm_silu_backward(
            dy.double(), *wide[:2], want_statistics(wide), *rest, stream.double(), 0.7, wants_sum
        )
        got = op.group_norm_silu_backward(
            dy, x, x2, stats, 4, weight, bias, emb, input_bias, scale, shift, True, stream, 0.7, wants_sum
        )
        for one, other, like in zip(got[:2], want[:2], (x, x2), strict=True):
            assert one.stride() == like.stride() and one.dtype == dtype
            assert (one.double() - other).abs().max() <= 4 * torch.finfo(dtype).eps * other.abs().max()
        assert got[2].dtype == torch.float32 and torch.allclose(got[2].double(), want[2], rtol=1e-5, atol=2e-5)
        assert got[2][2].any() == wants_sum


def want_statistics(wide):
    return reference.statistics(wide[0], wide[1], 4, 1e-5, wide[4], wide[5])


def test_silu_far_from_zero_and_non_finite():
    x = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1, 1)
    for big in (50.0, 90.0, 200.0, 1e30):
        bias = torch.tensor([-big, big], requires_grad=True)
        y = functional.group_norm_silu(x, 1, None, bias)
        want_bias = bias.detach().double().requires_grad_()
        want = F.silu(torch.group_norm(x.double(), 1, torch.ones(2).double(), want_bias))
        assert torch.isfinite(y).all() and torch.allclose(y.double(), want, rtol=1e-5, atol=1e-30)
        y.sum().backward()
        want.sum().backward()
        assert torch.allclose(bias.grad.double(), want_bias.grad, rtol=1e-5, atol=1e-7)
    x = torch.full((1, 4, 3, 3), float("nan"), requires_grad=True)
    y = functional.group_norm_silu(x, 2, None, None)
    y.sum().backward()
    assert y.isnan().all() and x.grad.isnan().all()


@LAYOUTS
def test_operators_are_registered_as_torch_wants_them(channels_last):
    op = torch.ops.sign_fast
    t = cases.make((2, 24, 4, 6), 6, channels_last=channels_last, second=10).tensors
    folds = [t["emb"], t["input_bias"], t["scale"], t["shift"], True]
    whole = torch.randn(2, 24, 4, 6)
    for pair in (True, False):
        x, x2 = (t["x"], t["x2"]) if pair else (torch.cat([t["x"], t["x2"]], dim=1), None)
        arguments = (x, x2, 6, t["weight"], t["bias"], 1e-5, *folds)
        torch.library.opcheck(op.group_norm_silu, arguments)
        torch.library.opcheck(op.group_norm_silu_forward, arguments)
        _, stats = op.group_norm_silu_forward(*arguments)
        arguments = (whole, x, x2, stats, 6, t["weight"], t["bias"], *folds, None if pair else whole, 0.7, pair)
        torch.library.opcheck(op.group_norm_silu_backward, arguments)
        sums = op.group_norm_silu_backward(*arguments)[2]
    for scale in (t["scale"], None):
        torch.library.opcheck(op.group_norm_silu_parameter_gradients, (sums, t["weight"], t["bias"], scale))
    arguments = (x, whole, t["bias"], 0.7, 6, t["weight"], None, 1e-5, True)
    torch.library.opcheck(op.residual_group_norm_silu, arguments)
    torch.library.opcheck(op.residual_group_norm_silu_forward, arguments)


def test_gradients_of_gradients():
    inputs = cases.make((2, 8, 3, 3), 2, folds="weight bias emb scale shift")

    def second(run, inputs):
        first = cases.gradients(run(inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first.values()), inputs.tensors["x"])[0]

    want = second(cases.plain, inputs.to(torch.float64, leaves=True))
    assert_close(second(cases.fast, inputs.to(leaves=True)), want, second(cases.plain, inputs.to(leaves=True)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda op, x: op(x, None, 5, None, None, 1e-5, None, None, None, None, True), "24 channels do not divide"),
        (lambda op, x: op(x, x[:1], 6, None, None, 1e-5, None, None, None, None, True), "x2 does not fit"),
        (lambda op, x: op(x, x, 6, x[0, :, 0, 0], None, 1e-5, None, None, None, None, True), "weight does not fit"),
        (lambda op, x: op(x, None, 6, None, None, 1e-5, x[:1, :5, 0, 0], None, None, None, True), "emb does not fit"),
        (lambda op, x: op(x[0], None, 6, None, None, 1e-5, None, None, None, None, True), "x must be"),
    ],
)
def test_the_operators_check_their_shapes(call, message):
    """They read memory by these sizes: a wrong one must not reach the kernel."""
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.sign_fast.group_norm_silu, torch.ones(2, 24, 4, 4))


OTHER_CPU = """
import torch
from tests import group_norm_cases as cases
from tests.kernels import test_group_norm_silu_cpp as tests
from sign_fast.kernels import extension
assert extension.module().capability() == {name!r}
for dtype in tests.DTYPES:
    for last in (True, False):
        tests.check(cases.make((2, 24, 5, 5), 6, dtype, channels_last=last, second=7))
        tests.check(cases.make((1, 100, 9, 7), 10, dtype, channels_last=last, folds="weight bias"))
        tests.check(cases.make((1, 36, 6, 6), 4, dtype, channels_last=last, folds="skip join_bias weight bias"))
"""


@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_lesser_cpus(limit):
    run_on(limit, OTHER_CPU)

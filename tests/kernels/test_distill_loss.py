"""The distillation losses on the CPU: against float64, the published numbers, and torch's own rules for ops."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels import dispatch
from sign_fast.kernels.distill_loss import op, reference
from tests import distill_loss_cases as cases
from tests.golden_rules import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, arrays, normal, relative_error

EACH_LOSS = pytest.mark.parametrize("name", cases.LOSSES)
EACH_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


@EACH_LOSS
@EACH_DTYPE
@pytest.mark.parametrize("shape", [*cases.SHAPES, (5, 4, 128, 128), (2, 3, 256, 256)], ids=str)
def test_against_float64(shape, dtype, name):
    cases.check(name, cases.make(shape, dtype, weighted=len(shape) == 2), "cpu", "cpp")


@EACH_LOSS
def test_channels_last_and_weights(name):
    cases.check(name, cases.make((3, 3, 8, 8), torch.float32, weighted=True, channels_last=True), "cpu", "cpp")


@EACH_LOSS
@EACH_DTYPE
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 3, 96, 96)], ids=str)
def test_nan_samples(shape, dtype, name):
    case = cases.with_nan(cases.make(shape, dtype), ("images", 0), ("y_real", 1), ("y_fake", 3))
    cases.check(name, case, "cpu", "cpp")


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32, 32), (1, 4, 160, 160)], ids=str)
def test_both_at_once(shape, dtype):
    cases.check_both(cases.make(shape, dtype), "cpu", "cpp")
    cases.check_both(cases.make(shape, dtype, weighted=True), "cpu", "cpp")


def test_both_at_once_with_nan():
    case = cases.with_nan(cases.make((4, 3, 8, 8), torch.float32), ("y_real", 1), ("y_fake", 3))
    cases.check_both(case, "cpu", "cpp")


def test_a_vanishing_omega():
    """omega has a floor: the loss stays finite where the teacher returns the images."""
    case = cases.make((2, 3, 8, 8), torch.float32)
    case.tensors["y_real"] = case.tensors["images"].clone()
    cases.check("sid", case, "cpu", "cpp")


@EACH_LOSS
def test_second_derivatives(name):
    case = cases.make((2, 2, 3, 3), torch.float32)

    def gradients(case):
        loss = cases.LOSSES[name][case.sigma.dtype == torch.float64](case)
        leaves = [t for t in case.tensors.values() if t.requires_grad]
        found = torch.autograd.grad((loss**2).sum(), leaves, create_graph=True, allow_unused=True)
        square = sum((g**2).sum() for g in found if g is not None)
        return torch.autograd.grad(square, leaves, allow_unused=True)

    for got, want in zip(gradients(case.to()), gradients(case.to(torch.float64)), strict=True):
        if want is not None:
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_graph_of_nothing():
    """The fake loss sends nothing to the images, with create_graph too."""
    case = cases.make((2, 2, 3, 3), torch.float32)
    images, y_real, y_fake = case.tensors.values()
    images.requires_grad_()
    _, fake = functional.distill_losses(images, y_real, y_fake, case.sigma)
    assert torch.autograd.grad(fake.sum(), images, create_graph=True, allow_unused=True)[0] is None


def test_samples_do_not_depend_on_batch_or_threads():
    case = cases.make((6, 3, 96, 96), torch.float32)
    whole = functional.distill_loss_gradients(*case.tensors.values(), case.sigma)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        again = functional.distill_loss_gradients(*case.tensors.values(), case.sigma)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    one = functional.distill_loss_gradients(*(t[4:5] for t in case.tensors.values()), case.sigma[4:5])
    assert all(torch.equal(a[4:5], b) for a, b in zip(whole, one, strict=True))


def test_the_plain_form_is_the_same():
    """What runs in float64, without the extension and inside a compiled network."""
    for name, (fast, plain) in cases.LOSSES.items():
        case = cases.with_nan(cases.make((3, 3, 4, 4), torch.float64), ("y_fake", 1))
        got, want = cases.run(fast, case.to(torch.float64)), cases.run(plain, case.to(torch.float64))
        assert torch.allclose(got[0], want[0], rtol=1e-13), name
        for a, b in zip(got[1], want[1], strict=True):
            assert b is None or torch.allclose(a, b, rtol=1e-12, atol=1e-14), name


def _arguments(mode, dtype=torch.float32, channels_last=False, weighted=False):
    case = cases.make((3, 3, 4, 5), dtype, weighted=weighted, channels_last=channels_last)
    return [*case.tensors.values()], case.weight, case.sigma if mode != "matching" else None


@pytest.mark.parametrize("mode", ["sid", "matching", "fake"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_operators_are_registered_as_torch_wants_them(mode, channels_last):
    ops = torch.ops.sign_fast
    for dtype, weighted in ((torch.float32, False), (torch.bfloat16, True)):
        three, weight, fake = _arguments(mode, dtype, channels_last, weighted)
        forward = (*three, 1.2, weight, fake, mode)
        torch.library.opcheck(ops.distill_loss_forward.default, forward)
        factors = ops.distill_loss_forward(*forward)[2]
        upstream = torch.rand(3)
        for wanted in ((True, True, True), (True, False, False), (False, False, True)):
            backward = (*three, factors, upstream, upstream, fake, 1.2, mode, *wanted)
            torch.library.opcheck(ops.distill_loss_backward.default, backward)
        both = (*three, 1.2, weight, fake, 0.5, 2.0, mode, True, True, True)
        torch.library.opcheck(ops.distill_loss_gradients.default, both)


@pytest.mark.parametrize("mode", ["sid", "matching", "fake"])
def test_the_operators_plain_form_agrees(mode):
    """CompositeExplicitAutograd's, which takes the C++ version's place where that is missing."""
    from sign_fast.kernels.distill_loss import registration

    three, weight, fake = _arguments(mode)
    three[1][0, 0, 0, 0] = torch.nan
    ops, plain = torch.ops.sign_fast, {name: i[2] for name, i in registration._IMPLEMENTATIONS.items()}
    forward = (*three, 1.2, weight, fake, mode)
    got, want = ops.distill_loss_forward(*forward), plain["distill_loss_forward"](*forward)
    backward = (*three, got[2], torch.rand(3), torch.rand(3), fake, 1.2, mode, True, True, True)
    both = (*three, 1.2, weight, fake, 0.5, 2.0, mode, True, True, True)
    pairs = [
        *zip(got, want, strict=True),
        *zip(ops.distill_loss_backward(*backward), plain["distill_loss_backward"](*backward), strict=True),
        *zip(ops.distill_loss_gradients(*both), plain["distill_loss_gradients"](*both), strict=True),
    ]
    for a, b in pairs:
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_compiles_without_a_break():
    case = cases.make((2, 3, 8, 8), torch.float32)

    def both(images, y_real, y_fake, sigma):
        student, fake = functional.distill_losses(images, y_real, y_fake, sigma)
        return student.sum() + fake.sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, both):
        one = case.to()
        loss = function(*one.tensors.values(), one.sigma)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(one.tensors.values()))))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_empty_batches_and_single_values():
    for shape in ((0, 3, 4, 4), (2, 1)):
        case = cases.make(shape, torch.float32).to()
        student, fake = functional.distill_losses(*case.tensors.values(), case.sigma)
        assert student.shape == fake.shape == (shape[0],)
        found = torch.autograd.grad(student.sum() + fake.sum(), list(case.tensors.values()))
        assert all(g.shape == shape for g in found)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, s: functional.fake_score_loss(x, x[:, :1], s), r"y_fake \(2, 3, 4, 4\) and images \(2, 1, 4, 4\)"),
        (lambda x, s: functional.fake_score_loss(x, x, s[:1]), "sigma must hold 2 values, not 1"),
        (lambda x, s: functional.sid_generator_loss(x, x, x[:1]), "must agree"),
        (lambda x, s: functional.sid_generator_loss(x, x, x, weight=s[:1]), "weight must hold 2 values, not 1"),
        (lambda x, s: functional.distribution_matching_loss(x, x[:1], x), "must agree"),
        (lambda x, s: functional.distill_losses(x, x, x, s[:1]), "sigma must hold 2 values, not 1"),
        (lambda x, s: functional.distill_loss_gradients(x, x, x[:1], s), "must agree"),
        (lambda x, s: functional.distill_losses(x, x, x.to("meta"), s), "y_fake is on meta, the rest on cpu"),
        (lambda x, s: functional.distill_losses(x, x, x, s.to("meta")), "sigma is on meta, the rest on cpu"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4, 4), torch.ones(2))


def test_an_infinite_student_loss_that_is_not_used_leaves_the_fake_loss_alone():
    for change in ("y_real", "weight"):
        case = cases.make((3, 2, 4, 4), torch.float32, weighted=True)
        if change == "weight":
            case.weight[1] = torch.inf
        else:
            case.tensors["y_real"][1, 0, 0, 0] = torch.inf
        one = case.to()
        _, fake = functional.distill_losses(*one.tensors.values(), one.sigma, weight=one.weight)
        (got,) = torch.autograd.grad(fake.sum(), one.tensors["y_fake"])
        (want,) = torch.autograd.grad(cases.plain_fake(one).sum(), one.tensors["y_fake"])
        assert torch.allclose(got, want, rtol=1e-5)


def test_gradients_of_the_weights():
    for dtype in (torch.float32, torch.float64):
        case = cases.make((3, 2, 4, 4), torch.float32, weighted=True).to(dtype)
        weight, sigma = case.weight.clone().requires_grad_(), case.sigma.clone().requires_grad_()
        student = functional.sid_generator_loss(*case.tensors.values(), weight=weight)
        fake = functional.fake_score_loss(case.tensors["y_fake"], case.tensors["images"], sigma)
        d_weight, d_sigma = torch.autograd.grad(student.sum() + fake.sum(), (weight, sigma))
        assert torch.allclose(d_weight, student / weight, rtol=1e-4)
        slope = -2 * sigma**-3 / (sigma**-2 + 4)
        assert torch.allclose(d_sigma, fake * slope, rtol=1e-4)


def test_small_noise_levels_in_half_precision():
    x = torch.randn(2, 8)
    sigma = torch.tensor([0.002, 1.0])
    got = functional.fake_score_loss(x, x + 1, sigma.half())
    assert torch.allclose(got, functional.fake_score_loss(x, x + 1, sigma.half().float())) and got.isfinite().all()


def test_samples_of_one_value():
    x = torch.tensor([0.5, -1.0])
    for dtype in (torch.float32, torch.float64):
        got = functional.sid_generator_loss(x.to(dtype), 2 * x.to(dtype), 3 * x.to(dtype))
        assert torch.allclose(got, torch.tensor([-1.1, -2.2]).to(dtype))


def test_forward_mode_and_function_transforms():
    case = cases.make((2, 2, 3, 3), torch.float32)
    images, y_real, y_fake = case.tensors.values()
    tangent = torch.randn_like(y_fake)

    def loss(y_fake):
        return functional.sid_generator_loss(images, y_real, y_fake).sum()

    leaf = y_fake.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.jvp(loss, (y_fake,), (tangent,))[1], (gradient * tangent).sum(), rtol=1e-4)
    assert torch.allclose(torch.func.grad(loss)(y_fake), gradient, rtol=1e-4, atol=1e-5)


def test_mixed_dtypes_take_the_plain_form():
    x = torch.randn(2, 3, 4, 4)
    assert op.supports(x, x, x) is None
    dispatch._warned.clear()
    assert "several dtypes" in str(op.supports(x, x.bfloat16(), x))
    with pytest.warns(dispatch.SlowPathWarning, match="give images, y_real and y_fake in one"):
        got = functional.sid_generator_loss(x, x.bfloat16(), x + 1)
    assert torch.equal(got, reference.sid_generator_loss(x, x.bfloat16(), x + 1, 1.2))


@pytest.mark.parametrize("nan", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_golden_generator_loss(alpha, nan):
    images, y_real, y_fake = (normal(seed, 5, 3, 8, 8) for seed in (1, 2, 3))
    if nan:
        y_real[2, 0, 3, 3] = float("nan")
    tensors = [t.requires_grad_() for t in (images, y_real, y_fake)]
    loss = functional.sid_generator_loss(*tensors, alpha).sum()
    loss.backward()
    golden, key = arrays("sid"), f"sid_gen/alpha{alpha}/nan{nan}"
    assert relative_error(loss, golden[f"{key}/sum"]) <= OUTPUT_TOLERANCE
    for name, t in zip(("images", "y_real", "y_fake"), tensors, strict=True):
        assert relative_error(t.grad, golden[f"{key}/grad_{name}"]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("nan", [0, 1])
def test_golden_fake_score_loss(nan):
    images, y_fake = normal(1, 5, 3, 8, 8), normal(4, 5, 3, 8, 8)
    if nan:
        y_fake[1, 1, 2, 2] = float("nan")
    y_fake.requires_grad_()
    golden, key = arrays("sid"), f"sid_fake/nan{nan}"
    loss = functional.fake_score_loss(y_fake, images, torch.from_numpy(golden[f"{key}/sigma"])).sum()
    loss.backward()
    assert relative_error(loss, golden[f"{key}/sum"]) <= OUTPUT_TOLERANCE
    assert relative_error(y_fake.grad, golden[f"{key}/grad_y_fake"]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("path", ["fast", "float64", "compiled", "transformed"])
@pytest.mark.parametrize("name", ["sid_generator_loss", "distribution_matching_loss", "distill_losses", "gradients"])
def test_weights_of_any_shape(name, path):
    """B values are B values: (B, 1, 1, 1) is no broadcast to (B, 1, 1, B)."""
    case = cases.make((3, 1, 4, 4), torch.float32, weighted=True)
    dtype = torch.float64 if path == "float64" else torch.float32
    images, y_real, y_fake = (case.tensors[key].to(dtype) for key in cases.NAMES)

    def call(weight, sigma):
        if name == "distill_losses":
            return functional.distill_losses(images, y_real, y_fake, sigma, weight=weight)
        if name == "gradients":
            return functional.distill_loss_gradients(
                images, y_real, y_fake, sigma, weight=weight, fake_weight=weight, fake_scale=0.3
            )
        return (getattr(functional, name)(images, y_real, y_fake, weight=weight),)

    found = call
    if path == "compiled":
        torch.compiler.reset()
        found = torch.compile(call, backend="eager")
    elif path == "transformed":
        if name == "gradients":
            pytest.skip("without autograd there is nothing to transform")

        def found(weight, sigma):
            return torch.func.vjp(lambda w: call(w, sigma), weight)[0]

    expected = call(case.weight, case.sigma)
    got = found(case.weight.view(3, 1, 1, 1), case.sigma.view(3, 1, 1, 1))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_no_gradients_of_gradients_without_autograd():
    for dtype in (torch.float32, torch.float64):
        case = cases.make((2, 1, 3, 3), torch.float32)
        images, y_real, y_fake = (case.tensors[key].to(dtype).requires_grad_() for key in cases.NAMES)
        found = functional.distill_loss_gradients(images, y_real, y_fake, case.sigma.to(dtype).requires_grad_())
        assert not any(t.requires_grad for t in found)


def test_only_what_is_asked_for_is_computed():
    case = cases.make((2, 1, 3, 3), torch.float32)
    images, y_real, y_fake = (case.tensors[key].requires_grad_() for key in cases.NAMES)
    loss = functional.sid_generator_loss(images, y_real, y_fake).sum()
    (whole,) = torch.autograd.grad(loss, images, retain_graph=True)
    (again,) = torch.autograd.grad(loss, [images], retain_graph=True)
    assert torch.equal(whole, again)
    both = torch.autograd.grad(loss, [images, y_fake])
    assert torch.equal(both[0], whole)

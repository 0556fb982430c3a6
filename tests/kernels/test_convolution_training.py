"""The differentiable convolution: every gradient against float64, what it falls back to, what it never computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import plain
from sign_fast import functional, nn
from sign_fast.kernels import dispatch, extension
from sign_fast.kernels.convolution import op, reference
from tests.lesser_cpu import run_on
from tests.oracle import assert_close

pytestmark = pytest.mark.skipif(extension.module() is None, reason="needs the C++ extension")

CHANNELS_LAST = torch.channels_last
OPERATORS = torch.ops.sign_fast


def last(t: Tensor) -> Tensor:
    """In channels_last, which of one channel or one pixel `contiguous` leaves open."""
    return torch.empty(t.shape, memory_format=CHANNELS_LAST).copy_(t)


class Case:
    """One convolution and the gradient of its output; `size` is the output's."""

    def __init__(self, channels, k=3, size=(8, 8), batch=2, resampling="none", layout=CHANNELS_LAST):
        generator = torch.Generator().manual_seed(
            channels[0] * 1009 + channels[1] * 53 + batch * 101 + k * 11 + size[0]
        )

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        times, divide = {"none": (1, 1), "up": (1, 2), "down": (2, 1)}[resampling]
        height, width = (side * times // divide for side in size)
        self.x = last(normal(batch, channels[0], height, width))
        weight = normal(channels[1], channels[0], k, k) / (channels[0] * k * k) ** 0.5
        self.weight = weight.contiguous(memory_format=layout)
        self.bias, self.resampling = normal(channels[1]), resampling
        self.dy = last(normal(batch, channels[1], *size))

    def gradients(self, function, dtype=torch.float32) -> list[Tensor]:
        """[y, dx, dweight, dbias]"""
        x, weight, bias = (t.to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias))
        y = function(x, weight, bias, resampling=self.resampling)
        return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), self.dy.to(dtype))]

    def check(self) -> None:
        before = dispatch.taken["convolution", "cpp"]
        got = self.gradients(functional.convolution)
        assert dispatch.taken["convolution", "cpp"] == before + 1
        wanted = self.gradients(reference.convolution, torch.float64)
        ordinary = self.gradients(reference.convolution)
        for name, mine, want, other in zip(("y", "dx", "dweight", "dbias"), got, wanted, ordinary, strict=True):
            # a bias' gradient may cancel to nothing
            assert_close(mine, want, other, name, self.dy if name == "dbias" else None)
        assert all(t.is_contiguous(memory_format=CHANNELS_LAST) for t in got[:2])
        assert got[2].stride() == self.weight.stride()


@pytest.mark.parametrize("resampling", ["none", "up", "down"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "channels",
    [(1, 24), (3, 24), (6, 31), (31, 6), (24, 24), (24, 3), (48, 48), (48, 144), (72, 24), (96, 48), (24, 1)],
    ids=str,
)
def test_gradients(channels, k, resampling):
    """The digits network's layers and channels that are no whole vectors; sizes that are no whole tiles."""
    for size, batch in [((8, 8), 5), ((4, 4), 40), ((8, 8), 33), ((6, 10), 3), ((5, 7), 2), ((2, 2), 3), ((1, 1), 1)]:
        if resampling == "up" and (size[0] % 2 or size[1] % 2):
            continue
        layout = CHANNELS_LAST if batch % 2 else torch.contiguous_format
        Case(channels, k, size, batch, resampling, layout).check()


def test_one_image():
    for size in [(8, 8), (4, 4), (3, 9), (13, 5)]:
        for k in (1, 3):
            Case((24, 40), k, size, 1).check()


@pytest.mark.parametrize("channels, size, batch", [((128, 256), (16, 16), 4), ((256, 256), (8, 8), 4)], ids=str)
def test_the_cifar_networks_layers(channels, size, batch):
    Case(channels, 3, size, batch).check()


@pytest.mark.parametrize("resampling", ["none", "up", "down"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "channels, size, batch", [((40, 24), (20, 20), 15), ((5, 72), (32, 32), 9), ((24, 24), (4, 4), 130)]
)
def test_no_bit_depends_on_the_number_of_threads(channels, size, batch, k, resampling):
    case, threads = Case(channels, k, size, batch, resampling), torch.get_num_threads()
    case.check()
    try:
        torch.set_num_threads(1)
        alone = case.gradients(functional.convolution)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            together = case.gradients(functional.convolution)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("resampling", ["none", "up", "down"])
def test_no_images(resampling):
    case = Case((24, 31), 3, (8, 8), 0, resampling)
    y, dx, dweight, dbias = case.gradients(functional.convolution)
    assert y.shape == (0, 31, 8, 8) and dx.shape == case.x.shape
    assert not dweight.any() and not dbias.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda dy: dy.contiguous(),
        lambda dy: dy[:, :1].expand(dy.shape),
        lambda dy: torch.cat([dy, dy], 1)[:, 3 : 3 + dy.shape[1]],
        lambda dy: dy.transpose(2, 3),
    ],
    ids=["NCHW", "expanded", "a part of the channels", "transposed"],
)
def test_gradients_of_any_strides(change):
    case = Case((24, 31), 3, (8, 8), 3)
    case.dy = change(case.dy)
    case.check()


def test_inputs_of_any_strides():
    """A network in NCHW becomes one in channels_last by its first convolution."""
    case = Case((24, 31), 3, (8, 8), 3)
    x = case.x
    for case.x in (torch.cat([x, x], 1)[:, 5:29], x.contiguous(), x.transpose(2, 3)):
        assert not case.x.is_contiguous(memory_format=CHANNELS_LAST)
        case.check()


class Calls(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "x bias", "weight bias", "x weight bias"])
def test_what_is_frozen_gets_no_gradient_computed(wanted):
    case = Case((24, 31))
    named = {name: getattr(case, name).requires_grad_(name in wanted.split()) for name in ("x", "weight", "bias")}
    y = functional.convolution(case.x, case.weight, case.bias)
    with Calls() as calls:
        got = torch.autograd.grad(y, [named[name] for name in wanted.split()], case.dy)
    assert ("convolution_input_gradient" in calls.names) == ("x" in wanted.split())
    assert ("convolution_weight_gradient" in calls.names) == ("weight" in wanted.split())
    assert not any(name.startswith(("convolution_backward", "mkldnn")) for name in calls.names)
    everything = dict(zip(("y", "x", "weight", "bias"), case.gradients(functional.convolution), strict=True))
    for name, gradient in zip(wanted.split(), got, strict=True):
        assert_close(gradient, everything[name].double(), everything[name], name, case.dy)


def test_a_frozen_filter_keeps_no_input():
    case = Case((24, 31))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        functional.convolution(case.x.requires_grad_(), case.weight, case.bias)
    assert kept == [case.weight.shape]


def test_without_gradients_it_is_as_fast():
    case = Case((24, 31))
    weight = case.weight.requires_grad_()
    with Calls() as calls, torch.no_grad():
        y = functional.convolution(case.x, weight, case.bias)
    assert calls.names == ["convolution_forward"] and not y.requires_grad
    assert torch.equal(y, functional.convolution(case.x, weight, case.bias))


@pytest.mark.parametrize("resampling", ["none", "up", "down"])
@pytest.mark.parametrize("k", [1, 3])
def test_second_derivatives(k, resampling):
    """Of Σ r·gradient, for every gradient and by everything that it depends on."""
    case = Case((6, 5), k, (4, 6), 2, resampling)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator) for t in (case.x, case.weight, case.bias)]

    def second(function, dtype):
        x, weight, bias, dy = (t.to(dtype).requires_grad_() for t in (case.x, case.weight, case.bias, case.dy))
        first = torch.autograd.grad(
            function(x, weight, bias, resampling=resampling), (x, weight, bias), dy, create_graph=True
        )
        total = sum((g * r.to(dtype)).sum() for g, r in zip(first, directions, strict=True))
        return [*(g.detach() for g in first), *torch.autograd.grad(total, (x, weight, dy))]

    got = second(functional.convolution, torch.float32)
    wanted, ordinary = second(reference.convolution, torch.float64), second(reference.convolution, torch.float32)
    for i, (mine, want, other) in enumerate(zip(got, wanted, ordinary, strict=True)):
        assert_close(mine, want, other, str(i))


def test_what_is_left_to_torch():
    x, weight = torch.randn(2, 6, 4, 4), torch.randn(5, 6, 3, 3)
    last, filters = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, weight))
    assert op.supports(last, weight, None) is None and op.supports(x, filters, None) is None
    odd = torch.randn(2, 6, 5, 4).contiguous(memory_format=CHANNELS_LAST)
    wide = torch.randn(5, 6, 5, 5)
    for arguments, why in [
        ((last.double(), filters.double(), None), "float32"),
        ((last.bfloat16(), filters.bfloat16(), None), "float32"),
        ((last, wide, None), "1×1 and 3×3"),
        ((odd, filters, None, "down"), "odd sides"),
        ((last[:, :, :0], filters, None), "no elements"),
        ((last.to("meta"), filters.to("meta"), None), "own library"),
    ]:
        assert why in op.supports(*arguments).why
        if not last.is_meta and last.numel() and why != "no elements":
            got, want = functional.convolution(*arguments[:3], resampling=(*arguments, "none")[3]), None
            want = reference.convolution(*arguments)
            assert got.shape == want.shape and (got.is_meta or torch.equal(got, want))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in op.supports(last, filters, None).why
        assert functional.convolution(last, filters).dtype == torch.bfloat16
    assert torch.equal(
        torch.func.vmap(lambda t: functional.convolution(t, filters))(last[None])[0], F.conv2d(last, filters, padding=1)
    )
    _, tangent = torch.func.jvp(lambda t: functional.convolution(t, filters), (last,), (last,))
    assert torch.allclose(tangent, F.conv2d(last, filters, padding=1), atol=1e-5)


def test_batched_gradients():
    """Several upstream gradients at a time, as Jacobians take them."""
    case = Case((6, 5), 3, (4, 6))
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    upstream = torch.stack([case.dy, -2 * case.dy])
    got = torch.autograd.grad(functional.convolution(*tensors), tensors, upstream, is_grads_batched=True)
    for batch, one in zip(got, case.gradients(functional.convolution)[1:], strict=True):
        assert torch.equal(batch, torch.stack([one, -2 * one]))


def test_compiled():
    """A compiler sees torch's convolution, of which it knows the gradients."""
    case = Case((6, 5), 3, (4, 4), 2)
    compiled = torch.compile(functional.convolution, backend="aot_eager", fullgraph=True)
    before = dispatch.taken["convolution", "cpp"]
    got, want = case.gradients(compiled), case.gradients(reference.convolution)
    assert dispatch.taken["convolution", "cpp"] == before
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("resampling", ["none", "up", "down"])
@pytest.mark.parametrize("k", [1, 3])
def test_operators(k, resampling):
    """PyTorch's own checks: schemas, and fake tensors with the strides of the real ones."""
    case = Case((6, 5), k, (4, 6), 2, resampling)
    checks = ["test_schema", "test_faketensor"]
    for name, arguments in [
        ("convolution_forward", (case.x, case.weight, case.bias, resampling)),
        ("convolution_input_gradient", (case.dy, case.weight, resampling)),
        ("convolution_weight_gradient", (case.dy, case.x, case.weight, resampling, True)),
        ("convolution_weight_gradient", (case.dy, case.x, case.weight, resampling, False)),
    ]:
        torch.library.opcheck(getattr(OPERATORS, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: functional.convolution(x, w, resampling="sideways"), "resampling must be"),
        (lambda x, w: functional.convolution(x, w[:, :3]), "weight does not fit"),
        (lambda x, w: functional.convolution(x, w, torch.ones(6)), "bias does not fit"),
        (lambda x, w: OPERATORS.convolution_input_gradient(x, w, "none"), "weight does not fit dy"),
        (lambda x, w: OPERATORS.convolution_weight_gradient(x, x, w, "none", True), "weight does not fit x and dy"),
        (lambda x, w: OPERATORS.convolution_weight_gradient(x[:, :5], x, w[..., :1], "none", True), "1×1 or 3×3"),
        (lambda x, w: OPERATORS.convolution_weight_gradient(x[:, :5], x, w[..., :1, :], "none", False), "1×1 or 3×3"),
        (lambda x, w: OPERATORS.convolution_weight_gradient(x[:1, :5], x, w, "none", True), "dy does not fit x"),
        (lambda x, w: OPERATORS.convolution_weight_gradient(x[:, :5], x, w, "up", True), "dy does not fit x"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    x = torch.ones(2, 6, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(x, torch.ones(5, 6, 3, 3))


LAYERS = {
    "bare": dict(kernel=3, bias=False),
    "1×1": dict(kernel=1),
    "up": dict(kernel=3, up=True),
    "down": dict(kernel=3, down=True),
    "up 1×1": dict(kernel=1, up=True),
    "down 1×1": dict(kernel=1, down=True),
    "fused up": dict(kernel=3, up=True, fused_resample=True),
    "fused down": dict(kernel=3, down=True, fused_resample=True),
    "filtered up": dict(kernel=3, up=True, resample_filter=[1, 3, 3, 1]),
    "filtered down": dict(kernel=3, down=True, resample_filter=[1, 3, 3, 1]),
    "filtered fused down": dict(kernel=3, down=True, fused_resample=True, resample_filter=[1, 3, 3, 1]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer(name):
    """nn.Conv2d by C++ wherever it convolves without a filter's padding, against its plain form."""
    layer = nn.Conv2d(24, 40, init_bias=1, **LAYERS[name]).to(memory_format=CHANNELS_LAST)
    x = torch.randn(3, 24, 8, 8).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    before = dispatch.taken["convolution", "cpp"]
    y = layer(x)
    assert dispatch.taken["convolution", "cpp"] == before + (name != "filtered fused down")
    dy = torch.randn(y.shape)
    tensors = [x, *layer.parameters()]
    got = [y.detach(), *torch.autograd.grad(y, tensors, dy)]

    def ordinary(dtype):
        copy = nn.Conv2d(24, 40, **LAYERS[name])
        copy.load_state_dict(layer.state_dict())
        copy = copy.to(dtype)
        input = x.detach().to(dtype).requires_grad_()
        y = plain.conv(copy, input)
        return [y.detach(), *torch.autograd.grad(y, [input, *copy.parameters()], dy.to(dtype))]

    for mine, want, other in zip(got, ordinary(torch.float64), ordinary(torch.float32), strict=True):
        assert_close(mine, want, other)


OTHER_CPU = """
from tests.kernels import test_convolution_training as tests
from sign_fast.kernels import extension
assert extension.module().capability() == {name!r}
for resampling in ("none", "up", "down"):
    for k in (1, 3):
        for channels in [(1, 24), (31, 6), (24, 40), (3, 3)]:
            tests.Case(channels, k, (6, 10), 5, resampling).check()
            tests.Case(channels, k, (2, 2), 2, resampling).check()
"""


@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_lesser_cpus(limit):
    run_on(limit, OTHER_CPU)

"""torch.compile, torch.export and fake tensors: every operator, the functions, whole networks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plain import Plain
from sign_fast import functional
from sign_fast.kernels import extension
from sign_fast.kernels.group_norm_silu import op as group_norm_op
from sign_fast.models import create
from sign_fast.models.precond import EDMPrecond
from tests import group_norm_cases as cases
from tests.oracle import assert_close

LAYOUTS = [torch.channels_last, torch.contiguous_format]
OPERATORS = torch.ops.sign_fast


def described(t):
    return tuple(t.shape), t.dtype, t.stride(), t.device.type


# ---- operators ----


def opcheck(name, *arguments, dynamic=True):
    """PyTorch's own checks of an operator: schema, fake tensors, autograd, ahead-of-time tracing."""
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(
        getattr(OPERATORS, name).default,
        arguments,
        test_utils=checks + (["test_aot_dispatch_dynamic"] if dynamic else []),
    )
    return getattr(OPERATORS, name)(*arguments)


# folds, channels of the second tensor, silu
NORMS = {
    "bare": ("", 0, False),
    "affine": ("weight bias", 0, True),
    "embedding": ("weight bias emb input_bias", 0, True),
    "adaptive pair": ("weight bias scale shift", 10, True),
    "everything": ("weight bias emb input_bias scale shift", 10, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_group_norm_operators(norm, layout, dtype):
    folds, second, silu = NORMS[norm]
    channels_last = layout == torch.channels_last
    t = cases.make((2, 24, 4, 6), 6, dtype, channels_last=channels_last, folds=folds, second=second).tensors
    dynamic = dtype == torch.float32
    x, x2, weight, bias = (t.get(name) for name in ("x", "x2", "weight", "bias"))
    rows = [t.get(name) for name in ("emb", "input_bias", "scale", "shift")]
    arguments = (x, x2, 6, weight, bias, 1e-5, *rows, silu)
    opcheck("group_norm_silu", *arguments, dynamic=dynamic)
    y, stats = opcheck("group_norm_silu_forward", *arguments, dynamic=dynamic)
    stream = None if second else torch.ones_like(y)
    arguments = (torch.ones_like(y), x, x2, stats, 6, weight, bias, *rows, silu, stream, 0.7, t.get("emb") is not None)
    sums = opcheck("group_norm_silu_backward", *arguments, dynamic=dynamic)[2]
    opcheck("group_norm_silu_parameter_gradients", sums, weight, bias, t.get("scale"), dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("folds", ["", "weight", "weight bias join_bias"])
def test_residual_operators(folds, layout, dtype):
    channels_last = layout == torch.channels_last
    t = cases.make((2, 24, 4, 6), 6, dtype, channels_last=channels_last, folds=f"skip {folds}").tensors
    arguments = (t["x"], t["skip"], t.get("join_bias"), 0.7, 6, t.get("weight"), t.get("bias"), 1e-5, True)
    opcheck("residual_group_norm_silu", *arguments, dynamic=dtype == torch.float32)
    opcheck("residual_group_norm_silu_forward", *arguments, dynamic=dtype == torch.float32)


def token_major(shape, dtype):
    batch, heads, tokens, channels = shape
    return torch.randn(batch, tokens, heads, channels).transpose(1, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [torch.randn, token_major], ids=["head_major", "token_major"])
def test_attention_operators(memory, dtype):
    q, k, v, dout = (memory((2, 3, 20, 8), dtype=dtype) for _ in range(4))
    opcheck("attention", q, k, v)
    out, logsumexp = opcheck("attention_forward", q, k, v)
    opcheck("attention_backward", dout, q, k, v, out, logsumexp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved, layout", list(itertools.product([True, False], LAYOUTS)), ids=str)
def test_projected_attention_operators(interleaved, layout, dtype):
    qkv = torch.randn(2, 48, 4, 5).to(dtype).contiguous(memory_format=layout)
    opcheck("projected_attention", qkv, 2, interleaved)
    out, logsumexp = opcheck("projected_attention_forward", qkv, 2, interleaved)
    opcheck("projected_attention_backward", torch.ones_like(out), qkv, out, logsumexp, 2, interleaved)


# ---- fake tensors ----


def fake_calls():
    """Calls of the public functions with tensors as the only arguments, by name."""

    def pair(x, x2, weight, scale, shift):
        return functional.group_norm_silu((x, x2), 6, weight, weight, scale=scale, shift=shift)

    def embedded(x, weight, emb):
        return functional.group_norm_silu(x, 6, weight, None, emb=emb, activation=None)

    def join(h, skip, bias):
        return functional.residual_group_norm_silu(h, skip, bias, 0.7, 6, None, None)

    def projected(qkv):
        return functional.projected_attention(qkv, 2)

    def in_turn(qkv):
        return functional.projected_attention(qkv, 2, interleaved=False)

    plane, vector, row, tokens = (2, 24, 4, 6), (24,), (2, 24), (2, 3, 20, 8)
    return {
        "pair": (pair, (2, 14, 4, 6), (2, 10, 4, 6), vector, row, row),
        "embedded": (embedded, plane, vector, (1, 24)),
        "join": (join, plane, plane, vector),
        "projected_attention": (projected, plane),
        "projected_attention in turn": (in_turn, plane),
        "attention": (functional.attention, tokens, tokens, tokens),
        "attention of (B·heads, T, d)": (functional.attention, *[tokens[1:]] * 3),
    }


def results(function, tensors, gradients):
    """What a call and, if wanted, its backward pass return."""
    tensors = [t.detach().requires_grad_(gradients) for t in tensors]
    out = function(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    found = torch.autograd.grad(out, tensors, [torch.ones_like(y) for y in out]) if gradients else ()
    return [described(t) for t in (*out, *found)]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, None], ids=["channels_last", "nchw", "strided"])
@pytest.mark.parametrize("call", fake_calls())
def test_fake_tensors_agree(call, layout, dtype, gradients):
    function, *shapes = fake_calls()[call]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if layout is not None:
        tensors = [t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in tensors]
    else:
        tensors = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 2 else t for t in tensors]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in tensors]
    with mode:
        fake = results(function, fakes, gradients)
    assert fake == results(function, tensors, gradients)


# ---- whole networks ----


def network(name, layout):
    """A small network whose every weight counts: none is zero, as fresh last layers are."""
    torch.manual_seed(0)
    if name == "digits":
        net = create("digits-uncond")
    else:  # heads of 64 channels, norms that scale and shift, a 1×1 skip
        net = EDMPrecond(8, 3, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[8], dropout=0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net.to(memory_format=layout)


def inputs(net, layout, batch=2):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, net.img_channels, 8, 8, generator=g).contiguous(memory_format=layout)
    return x, torch.rand(batch, generator=g) + 0.2


NETWORKS = pytest.mark.parametrize("name", ["digits", "adm"])
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "nchw"])
# for what takes long: each network and each layout once
EACH = pytest.mark.parametrize(
    "name, layout",
    [("digits", torch.channels_last), ("adm", torch.contiguous_format)],
    ids=["digits-channels_last", "adm-nchw"],
)


def with_gradients(function, net, x, sigma):
    """{"out", "x", "parameters": one vector of all their gradients}."""
    x = x.detach().requires_grad_()
    out = function(x, sigma)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    dx, *found = torch.autograd.grad(out, [x, *net.parameters()], upstream)
    return {"out": out.detach(), "x": dx, "parameters": torch.cat([t.flatten() for t in found])}


def check_with_gradients(function, net, x, sigma):
    """Rule 1 beside the ordinary PyTorch network, for `function` that computes `net`."""
    wide = copy.deepcopy(net).double()
    want = with_gradients(lambda x, sigma: wide(x, sigma, dtype=torch.float64), wide, x.double(), sigma.double())
    plain = Plain(net)
    base = with_gradients(plain, plain.net, x, sigma)
    got = with_gradients(function, net, x, sigma)
    for what in want:
        assert_close(got[what], want[what], base[what], what)


def check_values(function, net, x, sigma):
    with torch.no_grad():
        want = copy.deepcopy(net).double()(x.double(), sigma.double(), dtype=torch.float64)
        assert_close(function(x, sigma), want, Plain(net)(x, sigma))


@BOTH_LAYOUTS
@NETWORKS
def test_fake_networks_agree(name, layout):
    net = network(name, layout)
    x, sigma = inputs(net, layout)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        real = described(net(x, sigma))
        fake_inputs = mode.from_tensor(x), mode.from_tensor(sigma)
        with mode:
            assert described(net(*fake_inputs)) == real

    def gradients(x):
        return [described(t) for t in torch.autograd.grad(net(x, sigma).sum(), [x, *net.parameters()])]

    fake_x = mode.from_tensor(x.clone().requires_grad_())
    with mode:
        fake = gradients(fake_x)
    assert fake == gradients(x.requires_grad_())


class Graphs:
    """A backend that keeps the graphs and hands them on; counts operators in them and in their subgraphs."""

    def __init__(self, inner=None):
        self.inner = inner
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward if self.inner is None else self.inner(graph, example_inputs)

    def operators(self):
        nodes = [
            node
            for graph in self.graphs
            for module in graph.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
        ]
        names = [str(node.target) for node in nodes if node.op == "call_function"]
        return {name.split(".")[1] for name in names if name.startswith("sign_fast.")}


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(net, backend="aot_eager", **options):
    return torch.compile(net, fullgraph=True, backend=backend, **options)


@EACH
def test_compiles_without_a_break(name, layout, fresh):
    """fullgraph=True raises at a break; one graph is compiled for inference and one for training."""
    net = network(name, layout)
    graphs = Graphs(torch._dynamo.lookup_backend("aot_eager"))
    function = compiled(net, graphs)
    check_values(function, net, *inputs(net, layout))
    assert len(graphs.graphs) == 1
    check_with_gradients(function, net, *inputs(net, layout))
    assert len(graphs.graphs) == 2


def test_inductor(fresh):
    net = network("adm", torch.channels_last)
    check_values(compiled(net, "inductor"), net, *inputs(net, torch.channels_last))


def test_one_graph_for_every_batch(fresh):
    layout = torch.channels_last
    net = network("digits", layout)
    graphs = Graphs()
    function = compiled(net, graphs, dynamic=True)
    for batch in (2, 5):
        check_values(function, net, *inputs(net, layout, batch))
        check_with_gradients(function, net, *inputs(net, layout, batch))
    assert len(graphs.graphs) == 2


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@EACH
def test_export(name, layout, strict, fresh):
    net = network(name, layout).eval().requires_grad_(False)
    program = torch.export.export(net, inputs(net, layout), strict=strict)
    check_values(program.module(), net, *inputs(net, layout))


def test_export_for_every_batch(fresh):
    net = network("digits", torch.channels_last).eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "sigma": {0: batch}}
    program = torch.export.export(net, inputs(net, torch.channels_last, 3), dynamic_shapes=shapes)
    for size in (2, 7):
        check_values(program.module(), net, *inputs(net, torch.channels_last, size))


# ---- with the library's operators in the graph, as on a GPU ----


INFERENCE = {"group_norm_silu", "residual_group_norm_silu", "projected_attention"}
FORWARD = {f"{name}_forward" for name in INFERENCE}
BACKWARD = {"group_norm_silu_backward", "group_norm_silu_parameter_gradients", "projected_attention_backward"}


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@EACH
def test_operators_in_the_graph_agree(name, layout, fresh, monkeypatch):
    """A compiled network on the CPU with C++ operators in place of the plain norms that are traced there."""
    supports = group_norm_op.supports
    monkeypatch.setattr(
        group_norm_op, "supports", lambda x, *others: None if x.dtype == torch.float32 else supports(x, *others)
    )
    net = network(name, layout)
    graphs = Graphs(torch._dynamo.lookup_backend("aot_eager"))
    function = compiled(net, graphs)
    check_values(function, net, *inputs(net, layout))
    assert graphs.operators() == INFERENCE
    graphs.graphs.clear()
    check_with_gradients(function, net, *inputs(net, layout))
    assert graphs.operators() == FORWARD | BACKWARD


@pytest.fixture
def fake_gpu(monkeypatch, fresh):
    """A mode in which tensors of "cuda:0" exist without a GPU."""
    from tests.fake_gpu import pretend

    with pretend(monkeypatch) as mode:
        yield mode


def on_fake_gpu(net, mode):
    """Make its parameters and buffers fake tensors of a GPU, strides as they are."""
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                fake = mode.from_tensor(p).detach().to("cuda:0")
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = mode.from_tensor(b).to("cuda:0")


@pytest.mark.parametrize(
    "layout, dtype", [(torch.channels_last, torch.bfloat16), (torch.contiguous_format, torch.float32)], ids=str
)
@NETWORKS
def test_a_gpu_runs_the_operators(name, layout, dtype, fake_gpu):
    """Compiled for a GPU, inference and training, the graph has the library's operators, and none in plain torch."""
    net = network(name, layout)
    x, sigma = inputs(net, layout)
    graphs = Graphs()
    function = compiled(net, graphs)
    with fake_gpu as mode:
        on_fake_gpu(net, mode)
        x, sigma = (mode.from_tensor(t).to("cuda:0") for t in (x, sigma))
        with torch.no_grad():
            out = function(x, sigma, dtype=dtype)
        assert out.device == torch.device("cuda:0") and out.shape == x.shape
        assert graphs.operators() == INFERENCE | {"sampler_step"}
        graphs.graphs.clear()
        assert function(x, sigma, dtype=dtype).requires_grad
        assert graphs.operators() == FORWARD | BACKWARD

"""The combination of states: C++ against float64 and the reference's bits, compilation, gradients, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sign_fast import functional
from sign_fast.kernels import extension
from sign_fast.kernels.combine import reference
from tests.combine_cases import DTYPES, KINDS, SHAPES, by, make, view
from tests.oracle import assert_close

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason="the C++ extension is not built")


def same(a, b):
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def written_out(states, coefficients, dtype=torch.float64):
    """Σ c·x as one writes it in ordinary torch, all in `dtype`."""
    return sum(c * x.to(dtype) for c, x in zip(coefficients.tolist(), states, strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 9))
def test_cpp_against_float64(count, dtype):
    for shape in SHAPES:
        for first in range(4):
            states, coefficients = make(shape, count, first)
            with by("cpp"):
                got = functional.combine(states, coefficients, dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            plain = written_out(states, coefficients, wide).to(dtype)
            terms = torch.stack([(c * x.double()).abs().max() for c, x in zip(coefficients, states, strict=True)])
            assert_close(got, written_out(states, coefficients), plain, terms=terms)
            want = reference.combine(states, coefficients, dtype)
            assert got.dtype == dtype and got.stride() == torch.empty_like(got).stride()
            assert torch.equal(got, want), "the reference's bits"


@needs_extension
def test_the_result_takes_the_first_states_dtype_and_layout():
    g = torch.Generator().manual_seed(0)
    for kind, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        for other in KINDS:
            states = view((2, 3, 8, 6), torch.bfloat16, kind, g), view((2, 3, 8, 6), torch.float64, other, g)
            got = functional.combine(states, (0.5, -2))
            assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=layout)


@needs_extension
def test_numbers_and_a_tensor_are_the_same_coefficients():
    states, coefficients = make((2, 3, 4, 4), 5)
    want = functional.combine(states, coefficients)
    assert torch.equal(functional.combine(states, coefficients.tolist()), want)
    assert torch.equal(functional.combine(tuple(states), torch.stack((coefficients, -coefficients), 1)[:, 0]), want)


@needs_extension
def test_float64_keeps_what_float32_would_lose():
    one, small = torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), 1e-12)
    assert torch.equal(functional.combine((one, small), (1, 1), torch.float64), one.double() + small.double())
    assert torch.equal(functional.combine((one.double(), small), (1, 1), torch.float32), one)
    third = functional.combine((one,), (1 / 3,), torch.float64)
    assert (third == 1 / 3).all(), "coefficients are not rounded to float32"


@needs_extension
def test_infinities_and_nan_are_torchs():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, 0.0, -0.0]).view(1, 1, 2, 3)
    for dtype in DTYPES:
        for coefficients in ((0.0, 1.0), (1.0, -1.0), (-1.0, 1e30)):
            got = functional.combine((x, x.flip(3)), coefficients, dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            want = written_out((x, x.flip(3)), torch.tensor(coefficients, dtype=torch.float64), wide).to(dtype)
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@needs_extension
def test_the_number_of_threads_changes_nothing():
    states, coefficients = make((24, 3, 64, 64), 3)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(functional.combine(states, coefficients))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


DIGEST = """
import hashlib, torch
from sign_fast import functional
found = hashlib.sha256()
x = ((torch.arange(2 * 3 * 37 * 35, dtype=torch.float64) % 2400 - 1200) / 1001).view(2, 3, 37, 35)
dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16
for dtype in dtypes:
    y = functional.combine([x.roll(j, 3).to(d) for j, d in enumerate(dtypes)], (0.3, -1.7, 1 / 3, 0.9), dtype)
    found.update(y.view(torch.uint8).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), found.hexdigest())
"""


@needs_extension
def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for capability in ("default", "avx2", "avx512"):  # a processor without one takes what it has
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        name, digest = done.stdout.split()
        found[name] = digest
    assert len(set(found.values())) == 1 and "DEFAULT" in found


@needs_extension
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(shape).contiguous(memory_format=layout)
        with by("cpp"):
            got = functional.combine((x, x.double()), (1, 2), torch.float16)
        assert got.shape == shape and got.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_registered_as_torch_wants_it(kind):
    g = torch.Generator().manual_seed(0)
    states = [view((2, 3, 4, 6), dtype, k, g) for dtype, k in ((torch.float32, kind), (torch.bfloat16, "slice"))]
    coefficients = torch.tensor([0.5, 2], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.float16):
        torch.library.opcheck(torch.ops.sign_fast.combine, (states, coefficients, dtype))
    torch.library.opcheck(torch.ops.sign_fast.combine, (states[:1], coefficients[:1], torch.float32))


def odd_states():
    """Tensors whose strides say little: of single images, channels and pixels, of every second image."""
    g = torch.Generator().manual_seed(0)
    yield from (view((2, 3, 4, 6), torch.float32, kind, g) for kind in KINDS)
    yield from (torch.randn(7, 1, 5, 4)[::3][:1], torch.randn(2, 3, 1, 1), torch.randn(4, 1, 3, 3)[::2])
    yield torch.randn(2, 12).as_strided((2, 1, 3, 4), (12, 1, 4, 1))
    yield torch.randn(0, 3, 4, 4)


def test_fake_tensors_agree():
    coefficients = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for x in odd_states():
        real = functional.combine((x, x), coefficients, torch.bfloat16)
        with FakeTensorMode() as mode:
            fake = functional.combine([mode.from_tensor(x)] * 2, mode.from_tensor(coefficients), torch.bfloat16)
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
        assert same(real, torch.ops.sign_fast.combine([x, x], coefficients, torch.bfloat16))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiles_without_a_break(backend):
    torch._dynamo.reset()
    states, coefficients = make((2, 3, 8, 8), 4)
    with torch.no_grad():
        got = torch.compile(functional.combine, fullgraph=True, backend=backend)(states, coefficients)
    assert torch.allclose(got, functional.combine(states, coefficients), rtol=1e-13, atol=1e-13)


def test_gradients():
    states = torch.randn(3, 2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = torch.tensor([0.5, -2, 3], dtype=torch.float64)
    with warnings.catch_warnings(), by("reference"):
        warnings.simplefilter("error")  # a gradient is no reason to warn
        assert torch.autograd.gradcheck(
            lambda c, *x: functional.combine(x, c), (c.requires_grad_(), *states.requires_grad_().unbind())
        )
    with torch.no_grad(), by("reference" if extension.missing() else "cpp"):
        functional.combine(states.unbind(), c)


def test_forward_mode():
    x, t = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    _, tangent = torch.func.jvp(lambda x: functional.combine((x, t), (0.25, 3.0)), (x,), (t,))
    assert torch.equal(tangent, 0.25 * t)


X = torch.ones(2, 3, 4, 4)
TWO = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: functional.combine((), ()), "1 to 8 states are needed, not 0"),
        (lambda: functional.combine([X] * 9, [1.0] * 9), "1 to 8 states are needed, not 9: sum more of them in turns"),
        (lambda: functional.combine((X[0],), (1,)), r"states must be \(B, C, H, W\), not \(3, 4, 4\)"),
        (lambda: functional.combine((X, X[:1]), (1, 1)), r"states \(2, 3, 4, 4\) and \(1, 3, 4, 4\) must agree"),
        (lambda: functional.combine((X, X.to("meta")), (1, 1)), "states must be on one device, not on cpu and meta"),
        (lambda: functional.combine((X, X.int()), (1, 1)), "a floating dtype is needed, not torch.int32"),
        (lambda: functional.combine((X, X), (1, 1), torch.uint8), "must have a floating dtype, not torch.uint8"),
        (lambda: functional.combine((X, X), (1, 1, 1)), r"must be \(2,\) torch.float64, not \(3,\)"),
        (lambda: functional.combine((X, X), TWO[:, None]), r"must be \(2,\) torch.float64, not \(2, 1\)"),
        (lambda: functional.combine((X, X), TWO.float()), r"must be \(2,\) torch.float64, not \(2,\) torch.float32"),
        (lambda: functional.combine((X, X), TWO.to("meta")), "coefficients on meta, states on cpu"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@needs_extension
@pytest.mark.parametrize(
    "states, coefficients, dtype, message",
    [
        ([], TWO[:0], torch.float32, "1 to 8 states are needed, not 0"),
        ([X] * 9, torch.ones(9).double(), torch.float32, "1 to 8 states are needed, not 9"),
        ([X, X], TWO[:1], torch.float32, r"coefficients must be \(2\) float64"),
        ([X, X], TWO.float(), torch.float32, r"coefficients must be \(2\) float64"),
        ([X, X[:1]], TWO, torch.float32, "of one shape"),
        ([X, X.int()], TWO, torch.float32, "float64, float32, bfloat16 or float16, not Int"),
        ([X, X], TWO, torch.int32, "float64, float32, bfloat16 or float16, not Int"),
    ],
)
def test_the_operator_reads_nothing_that_is_not_there(states, coefficients, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sign_fast.combine(states, coefficients, dtype)


CALL = """
import torch
from sign_fast import functional
x = torch.ones(1, 3, 2, 2)
for _ in range(3):
    functional.combine((x, x), (2.0, 0.5))
y = torch.ops.sign_fast.combine([x, x], torch.tensor([2.0, 0.5], dtype=torch.float64), torch.bfloat16)
print(y.dtype, y.double().sum().item())
"""


def test_without_the_extension_it_warns_once_and_the_operator_works():
    env = {**os.environ, "SIGN_FAST_DISABLE_EXT": "1"}
    done = subprocess.run([sys.executable, "-W", "always", "-c", CALL], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SlowPathWarning") == 1 and "combine" in done.stderr
    assert done.stdout.split() == ["torch.bfloat16", "30.0"]

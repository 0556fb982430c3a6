"""The sampler step's noise and its statistics, compilation, gradients, errors; test_sampler_step_cpp.py has the C++."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sign_fast import functional
from sign_fast.kernels.sampler_step import reference
from tests.oracle import assert_close
from tests.sampler_step_cases import LAYOUTS, PAIRS, SEEDS, views

# Random123's known answers: counter, key, words
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert reference.philox(_hex(counter), _hex(key)) == _hex(words)


def edge_words() -> torch.Tensor:
    """Zero, the largest, the octants' and the branches' boundaries, each with its neighbours."""
    middle = [i << 29 for i in range(9)] + [reference.NEAR_ONE, 0xFFFFFFFF - reference.NEAR_ONE]
    middle += [1 << i for i in range(33)] + [0xFFFFFFFF - (1 << i) for i in range(32)]
    return torch.tensor(sorted({m + d & 0xFFFFFFFF for m in middle for d in range(-3, 4)}))


def all_words(count: int = 500_000) -> torch.Tensor:
    """(N, 4) words: `count` random blocks, and every pair of the edges."""
    edges = edge_words()
    pairs = torch.cartesian_prod(edges, edges)
    pairs = pairs[: len(pairs) // 2 * 2].reshape(-1, 4)
    return torch.cat((reference.words(torch.tensor([2024]), 3, 4 * count)[0], pairs))


def units_off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error in units of the last place of float32(want); where want is 0 so must got be."""
    near = want.float().abs()
    unit = (torch.nextafter(near, torch.tensor(torch.inf)) - near).double()
    return float(((got.double() - want).abs() / unit).max())


def test_reference_normals_are_within_four_units():
    words = all_words()
    assert units_off(reference.normals(words), reference.normals(words, torch.float64)) <= 4
    for function in (reference.radius, lambda w, *d: torch.stack(reference.cos_sin(w, *d))):
        assert units_off(function(words), function(words, torch.float64)) <= 3


def test_bytes_of_known_values():
    x = torch.tensor([-2.0, -1.0, 0.0, 126.9 / 127.5, 1.0, torch.nan, torch.inf, -torch.inf]).view(1, 1, 2, 4)
    for images in (x, x.double()):  # truncated, not rounded
        assert functional.to_uint8(images).flatten().tolist() == [0, 0, 128, 254, 255, 0, 255, 0]


@pytest.fixture(scope="module")
def sample():
    """A million normals: 326 neighbouring seeds, images of CIFAR's size, two steps."""
    seeds = torch.arange(-163, 163)
    return torch.stack([functional.philox_normal(seeds, step, (3, 32, 32)).flatten(1).double() for step in (0, 1)])


def test_moments(sample):
    n = sample[0].flatten()
    count = len(n)
    mean, variance = n.mean(), n.var()
    z = (n - mean) / variance.sqrt()
    skewness, kurtosis = z.pow(3).mean(), z.pow(4).mean()
    for value, want, error in (
        (mean, 0, 1), (variance, 1, 2**0.5), (skewness, 0, 6**0.5), (kurtosis, 3, 24**0.5),
    ):  # fmt: skip
        assert abs(value - want) <= 5 * error / count**0.5
    # of each element over the seeds, and of each seed over the elements
    assert sample[0].mean(0).abs().max() <= 6 / sample.shape[1] ** 0.5
    assert sample[0].mean(1).abs().max() <= 5 / sample.shape[2] ** 0.5


def test_distribution_by_kolmogorov_and_smirnov(sample):
    for n in (sample[0].flatten(), *(sample[0].flatten()[i::4] for i in range(4))):
        cdf = torch.special.ndtr(n.sort().values)
        below = torch.arange(len(n)) / len(n)
        statistic = torch.maximum(cdf - below, below + 1 / len(n) - cdf).max() * len(n) ** 0.5
        assert statistic <= 1.95  # passed with a probability of 0.999
        assert n.abs().max() > 4.2, "tails"


def test_independence(sample):
    def assert_uncorrelated(a, b):
        for f in (lambda t: t, lambda t: t.square() - 1):  # a shared radius shows in the squares alone
            x, y = f(a).flatten(), f(b).flatten()
            assert abs((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt()) <= 5 / len(x) ** 0.5

    now, following = sample
    assert_uncorrelated(now, following)  # steps
    for lag in (1, 2, 163):  # seeds
        assert_uncorrelated(now[lag:], now[:-lag])
    for lag in (1, 2, 3, 4, 5, 8, 16, 32, 33, 512, 1024, 2048):  # elements, rows, channels
        assert_uncorrelated(now[:, lag:], now[:, :-lag])
    assert_uncorrelated(now[1:], following[:-1])  # a step is not another seed


def calls(x, f, c, seeds):
    """Each public function, with and without its optional arguments."""
    four = c.view(-1, 1, 1, 1)
    layout = LAYOUTS[x.is_contiguous(memory_format=torch.channels_last)]
    return (
        functional.philox_normal(seeds, 1, tuple(x.shape[1:]), dtype=x.dtype, memory_format=layout),
        functional.sampler_step(x, f, c, c, seeds=seeds, step=2, scale=0.5, sigma=c),
        functional.sampler_step(x, f, c, c),
        functional.sampler_step(x, seeds=seeds),
        functional.to_uint8(x, f, c, c),
        functional.to_uint8(x),
        functional.precondition(x, f, four, four),
    )


def odd_inputs():
    """Tensors whose strides say little: of single images, channels and pixels, of every second image."""
    yield from (views((2, 3, 4, 6), torch.float32, kind) for kind in ("nchw", "channels_last", "slice", "transposed"))
    yield from (torch.randn(7, 1, 5, 4)[::3][:1], torch.randn(2, 3, 1, 1), torch.randn(4, 1, 3, 3)[::2])
    yield torch.randn(2, 12).as_strided((2, 1, 3, 4), (12, 1, 4, 1))
    yield torch.randn(0, 3, 4, 4)


def test_fake_tensors_agree():
    for x in odd_inputs():
        f, c = torch.randn_like(x).to(torch.bfloat16), torch.rand(x.shape[0])
        arguments = (x, f, c, SEEDS[: x.shape[0]])
        real = calls(*arguments)
        with FakeTensorMode() as mode:
            fake = calls(*map(mode.from_tensor, arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_compiles_without_a_break():
    torch._dynamo.reset()
    for dtype, kind, backend in (
        (torch.float32, "nchw", "inductor"),
        (torch.bfloat16, "channels_last", "aot_eager"),
    ):
        x = views((2, 3, 8, 8), dtype, kind)
        f, c = torch.randn(2, 3, 8, 8).to(torch.bfloat16), torch.rand(2)
        with torch.no_grad():
            want = calls(x, f, c, SEEDS[:2])
            got = torch.compile(calls, fullgraph=True, dynamic=False, backend=backend)(x, f, c, SEEDS[:2])
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_a_compiled_step_is_compiled_for_all_steps():
    torch._dynamo.reset()
    compiled = torch.compile(functional.sampler_step, fullgraph=True, backend="aot_eager")  # raises at 8 compilations
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for step in range(12):
            options = {"seeds": SEEDS[:2], "step": step, "sigma": torch.rand(2)}
            assert torch.equal(compiled(x, **options), functional.sampler_step(x, **options))


def test_the_reference_can_be_compiled():
    """Its integers do not overflow: what C++ leaves undefined a compiler may use."""
    torch._dynamo.reset()
    words = torch.compile(reference.words, fullgraph=True)(SEEDS, 3, 256)
    assert torch.equal(words, reference.words(SEEDS, 3, 256))


def test_gradients():
    torch.manual_seed(0)
    x, f = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64).requires_grad_().unbind()
    c_skip, c_out, scale, sigma = torch.rand(4, 2, dtype=torch.float64).requires_grad_().unbind()
    seeds = SEEDS[:2]

    def step(x, f, c_skip, c_out, scale, sigma):
        return functional.sampler_step(x, f, c_skip, c_out, seeds=seeds, scale=scale, sigma=sigma)

    assert torch.autograd.gradcheck(step, (x, f, c_skip, c_out, scale, sigma))
    assert torch.autograd.gradcheck(functional.sampler_step, (x, f, c_skip, c_out))
    for shape in ((2, 1, 1, 1), (2, 3, 1, 1)):  # one for each image; for each channel, too
        coefficients = torch.rand(2, *shape, dtype=torch.float64).requires_grad_().unbind()
        assert torch.autograd.gradcheck(functional.precondition, (x, f, *coefficients))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_gradients_in_low_precision(dtypes):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 4, 4).to(dtype) for dtype in dtypes]
    c_skip, c_out, sigma = torch.rand(3, 2)
    upstream = torch.randn(2, 3, 4, 4).to(dtypes[0])

    def gradients(tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = functional.sampler_step(*leaves, c_skip, c_out, seeds=SEEDS[:2], scale=0.3, sigma=sigma)
        return torch.autograd.grad(y, leaves, upstream.to(y.dtype))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a gradient is no reason to warn
        got = gradients(tensors)
    for ours, want in zip(got, gradients([t.double() for t in tensors]), strict=True):
        assert_close(ours, want, want.to(ours.dtype))


def test_bytes_take_no_gradient():
    assert not functional.to_uint8(torch.ones(1, 3, 2, 2, requires_grad=True)).requires_grad


X, ONE, OTHER = torch.ones(2, 3, 4, 4), torch.ones(2), torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: functional.philox_normal(SEEDS.int(), 0, (3, 4, 4)), r"seeds must be \(B,\) int64"),
        (lambda: functional.philox_normal(SEEDS[None], 0, (3, 4, 4)), r"seeds must be \(B,\) int64"),
        (lambda: functional.philox_normal(SEEDS, 0, (3, 4)), r"shape must be \(C, H, W\), not \(3, 4\)"),
        (lambda: functional.philox_normal(SEEDS, 0, (3, -4, 4)), r"shape must be \(C, H, W\), not \(3, -4, 4\)"),
        (lambda: functional.philox_normal(SEEDS, 0, (3, 4, 4), dtype=torch.int32), "dtype must be a floating dtype"),
        (
            lambda: functional.philox_normal(SEEDS, 0, (3, 4, 4), memory_format=torch.preserve_format),
            "preserve_format is not supported",
        ),
        (lambda: functional.sampler_step(X[0]), r"images must be \(B, C, H, W\), not \(3, 4, 4\)"),
        (lambda: functional.sampler_step(X.int()), "images must be of a floating dtype, not torch.int32"),
        (lambda: functional.sampler_step(X, X, ONE), "come together"),
        (lambda: functional.sampler_step(X, OTHER, ONE, ONE), "must agree"),
        (lambda: functional.sampler_step(X, X.to("meta"), ONE, ONE), "x is on cpu, F on meta"),
        (lambda: functional.sampler_step(X, X, ONE, torch.ones(3)), "coefficients must be 1 or 2 values"),
        (lambda: functional.sampler_step(X, X, ONE, ONE.to("meta")), "coefficients on meta, images on cpu"),
        (lambda: functional.sampler_step(X, seeds=SEEDS[:3]), "3 seeds for 2 images"),
        (lambda: functional.sampler_step(X, seeds=SEEDS[:2].to("meta")), "seeds on meta, images on cpu"),
        (lambda: functional.sampler_step(X, seeds=SEEDS[:2], sigma=torch.ones(3)), "must be 1 or 2 values"),
        (lambda: functional.to_uint8(X[0]), r"images must be \(B, C, H, W\)"),
        (lambda: functional.to_uint8(X.byte()), "images must be of a floating dtype, not torch.uint8"),
        (lambda: functional.to_uint8(X, c_out=ONE), "come together"),
        (lambda: functional.to_uint8(X, OTHER, ONE, ONE), "must agree"),
        (lambda: functional.precondition(X, OTHER, ONE[0], ONE[0]), "must agree"),
        (lambda: functional.precondition(X, X, torch.ones(3, 1, 1, 1), ONE[0]), r"\(3, 1, 1, 1\) does not broadcast"),
        (lambda: functional.precondition(X, X, ONE[0], torch.ones(1, 2, 1, 1, 1)), "does not broadcast"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


CALL = """
import torch
from sign_fast import functional
for _ in range(3):
    functional.sampler_step(torch.ones(1, 3, 2, 2), seeds=torch.ones(1, dtype=torch.int64))
noise = torch.ops.sign_fast.philox_normal(torch.tensor([-1]), 2, [3, 4, 4], 1.0, torch.float32, True)
print(noise.double().sum().item())
"""


def test_without_the_extension_it_warns_once_and_the_operators_work():
    env = {**os.environ, "SIGN_FAST_DISABLE_EXT": "1"}
    done = subprocess.run([sys.executable, "-W", "always", "-c", CALL], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SlowPathWarning") == 1 and "sampler_step" in done.stderr
    want = reference.philox_normal(torch.tensor([-1]), 2, (3, 4, 4), 1.0, torch.float32, True).double().sum()
    assert float(done.stdout) == float(want)


def test_forward_mode():
    x, f, t = torch.randn(3, 2, 3, 4, 4)
    c = torch.rand(2)
    _, tangent = torch.func.jvp(lambda x: functional.sampler_step(x, f, c, c), (x,), (t,))
    assert torch.allclose(tangent, c.view(2, 1, 1, 1) * t)

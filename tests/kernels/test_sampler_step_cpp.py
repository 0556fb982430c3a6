"""The sampler step's C++ version has the reference's bits, at every shape, layout, thread count and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels.sampler_step import reference
from tests.oracle import assert_close
from tests.sampler_step_cases import DTYPES, LAYOUTS, PAIRS, SEEDS, by, needs_extension, same, views

pytestmark = needs_extension
STEPS = (0, 1, -1, 2**31, 2**32 - 1)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 5, 7), (4, 40, 33), (1, 1, 1), (5, 1, 1), (1, 9, 2)], ids=str)
def test_cpp_noise_has_the_reference_bits(shape, last):
    for step in STEPS:
        with by("cpp"):
            got = functional.philox_normal(SEEDS, step, shape, scale=80.0, memory_format=LAYOUTS[last])
        assert same(got, reference.philox_normal(SEEDS, step, shape, 80.0, torch.float32, last))
    assert torch.equal(functional.philox_normal(SEEDS, 2**32 + 5, shape), functional.philox_normal(SEEDS, 5, shape)), (
        "steps count modulo 2³²"
    )


def test_cpp_normals_of_a_million_words_have_the_reference_bits():
    got = functional.philox_normal(SEEDS[3:4], 7, (1, 1024, 1024))
    assert torch.equal(got, reference.philox_normal(SEEDS[3:4], 7, (1, 1024, 1024), 1.0, torch.float32, False))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_noise_in_half_precision(dtype):
    want = reference.philox_normal(SEEDS, 3, (3, 9, 8), 1.0, torch.float64, False)
    got = functional.philox_normal(SEEDS, 3, (3, 9, 8), dtype=dtype)
    assert got.dtype == dtype
    assert_close(got, want, want.to(dtype))
    assert same(got, reference.philox_normal(SEEDS, 3, (3, 9, 8), 1.0, dtype, False))


def test_an_image_depends_on_its_seed_alone():
    seeds = torch.arange(-20, 20)
    whole = functional.philox_normal(seeds, 1, (3, 32, 32))
    for i in (0, 20, 39):
        one = functional.philox_normal(seeds[i : i + 1], 1, (3, 32, 32), memory_format=torch.channels_last)
        assert torch.equal(whole[i], one[0])
    assert torch.equal(functional.philox_normal(seeds.flip(0), 1, (3, 32, 32)), whole.flip(0))
    assert torch.equal(functional.philox_normal(seeds.repeat_interleave(2)[::2], 1, (3, 32, 32)), whole), "strides"
    assert len(torch.unique(whole.flatten(1), dim=0)) == 40


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_the_number_of_threads_changes_nothing(last):
    x, f = torch.randn(2, 24, 3, 64, 64).unbind()
    x, f = (t.contiguous(memory_format=LAYOUTS[last]) for t in (x, f))
    seeds, c = torch.arange(24), torch.rand(24)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            step = functional.sampler_step(x, f, c, c, seeds=seeds, step=1, sigma=c)
            found.append((step, functional.to_uint8(x, f, c, c), functional.precondition(x, f, c[0], c[1])))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


DIGEST = """
import hashlib, torch
from sign_fast import functional
x = ((torch.arange(2 * 3 * 37 * 35) % 2400 - 1200) / 1000).view(2, 3, 37, 35)
f, c, seeds = x.flip(1).to(torch.bfloat16), torch.tensor([0.3, 0.7]), torch.tensor([-5, 6])
found = hashlib.sha256()
for t in (x, x.contiguous(memory_format=torch.channels_last)):
    for y in (functional.sampler_step(t, f, c, c, seeds=seeds, sigma=c), functional.to_uint8(t, f, c, c)):
        found.update(y.contiguous().numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), found.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for capability in ("default", "avx2", "avx512"):  # a processor without one takes what it has
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        name, digest = done.stdout.split()
        found[name] = digest
    assert len(set(found.values())) == 1 and "DEFAULT" in found


KINDS = [("nchw", "nchw"), ("nchw", "channels_last"), ("channels_last", "slice"), ("transposed", "channels_last")]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_steps_against_float64(dtypes, kinds):
    torch.manual_seed(0)
    for shape in ((3, 3, 5, 7), (2, 3, 32, 32), (1, 1, 1, 1)):
        x, f = (views(shape, d, k) for d, k in zip(dtypes, kinds, strict=True))
        c_skip, c_out, sigma = torch.rand(3, shape[0])
        noise = {"seeds": SEEDS[: shape[0]], "step": 2, "scale": 0.75, "sigma": sigma}
        for arguments, options in (
            ((f, c_skip, c_out), noise),
            ((f, c_skip[:1], c_out), {}),
            ((None, None, None), noise),
            ((None, None, None), {}),
        ):
            with by("cpp"):
                got = functional.sampler_step(x, *arguments, **options)
            rest = [options.get(name) for name in ("seeds", "step", "scale", "sigma")]
            plain = reference.sampler_step(x, *arguments, *rest)
            wide = [t if t is None else t.double() for t in arguments]
            assert_close(got, reference.sampler_step(x.double(), *wide, *rest), plain)
            assert got.dtype == x.dtype and torch.equal(got, plain)
        four = (c_skip.view(-1, 1, 1, 1), c_out.view(-1, 1, 1, 1))
        with by("cpp"):
            got = functional.precondition(x, f, *four)
        assert_close(got, reference.precondition(x.double(), f.double(), *four), reference.precondition(x, f, *four))


def test_precondition_with_infinities_and_large_values():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, 0.0, 1.0]).view(1, 1, 2, 3)
    f = torch.ones_like(x)
    got = functional.precondition(x, f, torch.tensor(0.5), torch.tensor(2.0))
    assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), (0.5 * x + 2 * f).nan_to_num(7.0, 8.0, 9.0))


SPECIAL = [torch.nan, torch.inf, -torch.inf, -1.0, 1.0, 127 / 127.5, -128 / 127.5, -1.01, 3e38, 0.0, -0.0, 1 / 255]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_bytes_are_the_references(dtypes, kinds):
    torch.manual_seed(0)
    for shape in ((2, 3, 16, 16), (3, 1, 5, 7), (2, 4, 3, 3), (1, 3, 70, 40), (2, 1, 1, 1)):
        x, f = (views(shape, d, k) for d, k in zip(dtypes, kinds, strict=True))
        x[0, 0].copy_(torch.tensor(SPECIAL * 250)[: x[0, 0].numel()].view_as(x[0, 0]))
        c = torch.rand(shape[0]) + 0.5
        with by("cpp"):
            found = functional.to_uint8(x), functional.to_uint8(x, f, c, c[:1])
        assert same(found[0], reference.finish_images(x, None, None, None))
        assert same(found[1], reference.finish_images(x, f, c, c[:1]))


@pytest.mark.parametrize("kind", ["nchw", "channels_last", "slice", "transposed"])
def test_operators_are_registered_as_torch_wants_them(kind):
    op = torch.ops.sign_fast
    seeds, c = SEEDS[:2], torch.rand(2)
    x, f = views((2, 3, 4, 6), torch.float32, kind), views((2, 3, 4, 6), torch.bfloat16, "slice")
    torch.library.opcheck(op.philox_normal, (seeds, 3, [3, 4, 6], 2.0, torch.bfloat16, kind == "channels_last"))
    for arguments in ((x, f, c, c[:1], seeds, 3, c, c[:1]), (x, f, c, c, None, 0, None, None)):
        torch.library.opcheck(op.sampler_step, arguments)
    torch.library.opcheck(op.sampler_step, (x, None, None, None, seeds, 3, c, c))
    for arguments in ((x, f, c, c), (x, None, None, None)):
        torch.library.opcheck(op.finish_images, arguments)

"""The program in C++: both executors against `reference.run`, and what may not change an image."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sign_fast import models, optimize
from sign_fast.errors import SignFastError
from sign_fast.inference import reference
from sign_fast.kernels import extension
from sign_fast.sampling import engine
from tests.golden_rules import relative_error
from tests.network_cases import network
from tests.oracle import assert_close
from tests.program_cases import in_dtype, large_images, program_inputs, random_program

pytestmark = pytest.mark.skipif(extension.module() is None, reason=f"{extension.missing()}")

CPU = torch.device("cpu")


def executor(program, native=True, dtype=torch.float32):
    """`native` False: by ATen operators, as on a GPU."""
    return extension.module().Program(program, native, dtype, False)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(40))
def test_random_programs_natively(seed, threads):
    """Buffers share memory: what overlaps at a wrong time, or is read before it is written, is far off."""
    program = random_program(seed)
    x, rows = program_inputs(program, batch=1 + seed % 3, seed=seed, shared_rows=seed % 2 == 0)
    want = reference.run(in_dtype(program, torch.float64), x.double(), rows.double())
    given = x.clone(memory_format=torch.channels_last), rows.clone()
    native = executor(program)
    got = native.run(*given)
    assert relative_error(got, want) <= 1e-5
    assert torch.equal(given[0], x) and torch.equal(given[1], rows)
    native.run(torch.full_like(x, torch.nan), rows)
    assert torch.equal(native.run(x, rows), got)
    many = x.repeat(9, 1, 1, 1), rows if rows.shape[0] == 1 else rows.repeat(9, 1)
    for count in (1, 2):  # an image has the same bits in any batch, on any number of threads
        threads(count)
        assert torch.equal(native.run(*many), got.repeat(9, 1, 1, 1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_random_programs_by_aten(seed, dtype):
    program = random_program(seed)
    x, rows = program_inputs(program, batch=1 + seed % 3, seed=seed, shared_rows=seed % 2 == 0)
    x = x.to(dtype)
    want = reference.run(in_dtype(program, torch.float64), x.double(), rows.double())
    program = in_dtype(program, dtype)
    given = x.clone(memory_format=torch.channels_last), rows.clone()
    got = executor(program, native=False, dtype=dtype).run(*given)
    assert got.dtype == dtype
    assert_close(got, want, reference.run(program, x, rows))
    assert torch.equal(given[0], x) and torch.equal(given[1], rows)


@torch.no_grad()
@pytest.mark.parametrize("batch", [8, 64])
def test_more_threads_than_at_the_last_run(batch, threads):
    """The memory kept from the last run is not taken where it has no room for the threads of this one."""
    net = optimize(models.load("digits-uncond", "cpu"))
    x, rows = program_inputs(net.program, batch, seed=1)
    threads(1)
    want = net.native.run(x, rows)
    for count in (2, 4, 1):
        threads(count)
        assert torch.equal(net.native.run(x, rows), want)


@torch.no_grad()
def test_no_images():
    net = optimize(models.load("digits-uncond", "cpu"))
    x, rows = program_inputs(net.program, 0, seed=1, shared_rows=True)
    coefficients = torch.tensor([0.5, 0.5, 1.0])
    assert net.native.run(x, rows).shape == x.shape
    assert net.native.denoise(x, rows, coefficients).shape == x.shape
    assert executor(net.program, native=False).run(x, rows).shape == x.shape
    assert reference.run(net.program, x, rows).shape == x.shape


@torch.no_grad()
def test_engine_in_many_threads(monkeypatch):
    """More plans than are kept come and go; batches differ. Images are those of one thread."""
    monkeypatch.setattr(engine, "_PLANS_KEPT", 1)
    generator = engine.Engine(models.load("digits-cond", "cpu"))
    calls = [(list(range(1 + i % 5)), "edm" if i % 2 else "few_step", 1 + i % 3) for i in range(30)]
    want = [generator.generate(*call, None) for call in calls]

    def run(_):
        for i in range(3000):  # the plans alone, which threads race for
            generator._prepare("one_step", 1, {"sigma": 2.0 + i % 3})
        return all(torch.equal(generator.generate(*call, None), image) for call, image in zip(calls, want, strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["edm", "one_step"])
def test_nan_is_black(sampler):
    """As in `to_uint8`, from float64 and from float32 images."""
    net = models.load("digits-uncond", "cpu")
    next(p for name, p in net.named_parameters() if name.endswith("8x8_aux_conv.bias")).fill_(torch.nan)
    generator = engine.Engine(net)
    assert not generator.generate([0, 1], sampler, 1, None).any()


def test_a_lean_network_loads_nothing():
    lean = optimize(models.load("digits-uncond", "cpu"), lean=True)
    state = optimize(models.load("digits-uncond", "cpu")).state_dict()
    for given in (state, {}):
        with pytest.raises(SignFastError, match="cannot be loaded"):
            lean.load_state_dict(given, strict=False)


@torch.no_grad()
@pytest.mark.parametrize("shared_rows", [True, False])
def test_a_large_batch_is_run_in_parts(shared_rows):
    """What an image becomes is the same in every bit, and the memory is that of a part."""
    program = large_images(24)
    native, batch = executor(program), 11
    packed = native.bytes
    x, rows = program_inputs(program, batch, seed=1, shared_rows=shared_rows)
    coefficients = torch.tensor([0.5, 0.75, 0.25])
    whole, denoised = native.run(x, rows), native.denoise(x, rows, coefficients)
    assert native.bytes - packed < 40 * 2**20 < batch * 4 * 2 * 24 * 256**2
    for i in range(batch):
        own = rows if shared_rows else rows[i : i + 1]
        assert torch.equal(native.run(x[i : i + 1], own), whole[i : i + 1])
        assert torch.equal(native.denoise(x[i : i + 1], own, coefficients), denoised[i : i + 1])


@torch.no_grad()
def test_threads_with_batches_of_their_own():
    net = optimize(network("ddpmpp-cond"))
    calls = [program_inputs(net.program, batch, seed=batch) for batch in (1, 7, 2, 5, 3, 1, 4, 6)]
    want = [net.native.run(*call) for call in calls]

    def run(i):
        with torch.no_grad():
            return all(torch.equal(net.native.run(*calls[j % 8]), want[j % 8]) for j in range(i, i + 16))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))

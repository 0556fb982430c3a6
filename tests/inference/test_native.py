"""The program in C++: both executors against `reference.run`, and what may not change an image."""

from __future__ import annotations

import pytest
import torch

from golden_rules import relative_error
from oracle import assert_close
from program_cases import in_dtype, program_inputs, random_program
from sign_fast import models, optimize
from sign_fast.errors import SignFastError
from sign_fast.inference import reference
from sign_fast.kernels import extension

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
def test_random_programs_natively(seed):
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


def test_a_lean_network_loads_nothing():
    lean = optimize(models.load("digits-uncond", "cpu"), lean=True)
    state = optimize(models.load("digits-uncond", "cpu")).state_dict()
    for given in (state, {}):
        with pytest.raises(SignFastError, match="cannot be loaded"):
            lean.load_state_dict(given, strict=False)

"""The combination's Triton kernel has the reference's bits, and moves every tensor once."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels.combine import reference
from sign_fast.kernels.combine.registration import call
from sign_fast.kernels.device import interpreting
from tests.combine_cases import DTYPES, SHAPES, by, make
from tests.oracle import TRITON_DEVICE, assert_close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 9))
def test_the_references_bits(count, dtype):
    for i, shape in enumerate(SHAPES):
        states, coefficients = make(shape, count, i)
        with by("triton"):
            got = functional.combine([t.to(TRITON_DEVICE) for t in states], coefficients.to(TRITON_DEVICE), dtype)
        assert got.dtype == dtype and got.stride() == torch.empty_like(got).stride()
        plain = reference.combine(states, coefficients, dtype)
        if dtype == torch.bfloat16 and interpreting():  # the interpreter cuts off where it should round
            assert_close(got, reference.combine(states, coefficients, torch.float64), plain)
        else:
            assert torch.equal(got.cpu(), plain)


def test_many_programs_and_a_remainder():
    states, coefficients = make((5, 3, 41, 43), 2)
    got = functional.combine([t.to(TRITON_DEVICE) for t in states], coefficients.to(TRITON_DEVICE))
    assert torch.equal(got.cpu(), reference.combine(states, coefficients, torch.float64))


def test_memory_that_is_not_aligned():
    x = torch.randn(2 * 48 + 1, generator=torch.Generator().manual_seed(0)).to(TRITON_DEVICE)
    states = x[1:].view(2, 3, 4, 4), x[:-1].view(2, 3, 4, 4)
    got = functional.combine(states, (0.5, -2.0))
    assert torch.equal(got, 0.5 * states[0] - 2 * states[1])


def test_empty():
    x = torch.ones(0, 3, 4, 4, device=TRITON_DEVICE)
    assert functional.combine((x, x), (1, 2), torch.float64).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("count, message", [(9, "not 9"), (2, r"coefficients must be \(2,\) float64")])
def test_the_operator_reads_nothing_that_is_not_there(count, message):
    x, coefficients = torch.ones(1, 3, 4, 4, device=TRITON_DEVICE), torch.ones(1, device=TRITON_DEVICE).double()
    with pytest.raises(ValueError, match=message):
        call("combine", [x] * count, coefficients, torch.float32)


@pytest.mark.skipif(not interpreting(), reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_tensor_is_moved_once(count):
    from tests.traffic import count_bytes

    states, coefficients = make((3, 3, 32, 33), count)
    dense = [t.contiguous() for t in states]
    with count_bytes() as moved:
        y = functional.combine(dense, coefficients, torch.float32)
    for t in dense:
        assert moved.read_from(t) == t.nbytes
    assert moved.written == moved.written_to(y) == y.nbytes
    assert moved.read_from(coefficients) == moved.read - sum(t.nbytes for t in dense) <= 0.04 * moved.read

"""The counter of bytes that the traffic tests rely on, on kernels whose traffic is plain to see."""

from __future__ import annotations

import pytest
import torch

from sign_fast.kernels.device import interpreting
from sign_fast.kernels.launch import Launch
from tests import oracle
from tests.example_kernels import add, block_kernel, count_kernel, repeat_kernel, whole_kernel

if not interpreting():
    pytest.skip("bytes are counted in the interpreter", allow_module_level=True)

from tests.traffic import count_bytes

DEVICE = oracle.TRITON_DEVICE


@pytest.mark.parametrize("n", [1024, 1, 1000, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_lanes_move_nothing(n, dtype):
    x, skip = torch.randn(n, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE)
    y = torch.empty(n, dtype=torch.float64, device=DEVICE)
    with count_bytes() as moved:
        add(x, skip, y).run()
    assert torch.equal(y, (x.float() + skip).double())
    assert moved.read == n * (x.element_size() + 4) and moved.written == n * 8
    assert moved.read_from(x) == n * x.element_size() and moved.read_from(skip) == n * 4
    assert moved.written_to(y) == n * 8
    assert moved.read_from(y) == moved.written_to(x, skip) == 0


def test_unmasked_and_scalar_accesses():
    x = torch.arange(16.0, device=DEVICE)
    y = torch.empty_like(x)
    with count_bytes() as moved:
        Launch(whole_kernel, (1,), {"x": x, "y": y}, {"BLOCK": 16}).run()
    assert torch.equal(y, x)
    assert (moved.read, moved.written) == (17 * 4, 16 * 4)


def test_lanes_that_read_one_address_count_once_and_programs_each():
    x, y = torch.randn(8, device=DEVICE), torch.empty(48, device=DEVICE)
    with count_bytes() as moved:
        Launch(repeat_kernel, (3,), {"x": x, "y": y}, {"BLOCK": 16}).run()
    assert torch.equal(y, x.repeat_interleave(2).repeat(3))
    assert moved.read == 3 * 8 * 4 and moved.written == 48 * 4


def test_tensor_descriptors():
    x = torch.randn(5, 12, device=DEVICE)
    y = torch.zeros_like(x)
    with count_bytes() as moved:
        Launch(block_kernel, (1,), {"x": x, "y": y, "rows": 5, "columns": 12}, {"BLOCK": 16}).run()
    assert torch.equal(y, x)
    assert (moved.read, moved.written) == (60 * 4, 60 * 4)


def test_atomics_read_and_write():
    x, total = torch.ones(100, device=DEVICE), torch.zeros(1, device=DEVICE)
    with count_bytes() as moved:
        Launch(count_kernel, (2,), {"x": x, "total": total, "n": 100}, {"BLOCK": 64}).run()
    assert total.item() == 100
    assert moved.read_from(x) == 400
    assert moved.read_from(total) == moved.written_to(total) == moved.written == 8


def test_views_count_for_their_storage_and_nothing_is_counted_outside():
    whole = torch.randn(2048, device=DEVICE)
    y = torch.empty(100, device=DEVICE)
    add(whole[5:105], None, y).run()
    with count_bytes() as moved:
        add(whole[5:105], None, y).run()
    add(whole[5:105], None, y).run()
    assert moved.read == moved.read_from(whole) == moved.read_from(whole[7:]) == 400


def test_the_interpreter_is_left_as_it_was():
    from triton.runtime.interpreter import InterpreterBuilder

    before = dict(vars(InterpreterBuilder))
    with pytest.raises(ZeroDivisionError), count_bytes():
        raise ZeroDivisionError
    assert dict(vars(InterpreterBuilder)) == before

"""Bytes that the distillation losses move, counted in the interpreter: the least, plus a few numbers a sample."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.distill_loss import LossCase
from benchmarks.kernel_timing import prepare
from sign_fast.kernels.device import KNOWN, interpreting
from sign_fast.kernels.distill_loss import config

if not interpreting():
    pytest.skip("bytes are counted in the interpreter", allow_module_level=True)

from tests.traffic import count_bytes

SIZES = [(3, 32), (3, 64), (4, 64)]
SUMS = 4 * 4 * 2 * config.SPANS  # of a sample that is split: written and read back
NUMBERS = 64  # losses, factors, weights and upstream gradients of a sample


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["sid", "fake", "matching", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_backward_read_once(size, form, dtype):
    case = LossCase(1, dtype, form, *size)
    inputs = case.inputs("cpu")
    for direction in case.directions:
        call = prepare(inputs, case.ours, direction)
        with count_bytes() as moved:
            call()
        least = case.bytes(direction)
        assert least <= moved.read + moved.written <= 1.02 * least + NUMBERS + SUMS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_and_gradients_in_one_read(size, dtype):
    case = LossCase(2, dtype, "gradients", *size)
    elements = size[0] * size[1] ** 2
    fits = elements <= config.on_chip_limit(case.itemsize, KNOWN[90])
    assert fits == (size == (3, 32) or dtype == "bfloat16")
    with count_bytes() as moved, torch.no_grad():
        case.ours(case.inputs("cpu"))
    # where a sample does not fit on chip its gradients read the three inputs a second time
    least = case.bytes("forward") + (0 if fits else 3 * 2 * elements * case.itemsize)
    assert least <= moved.read + moved.written <= 1.02 * least + 2 * NUMBERS + (0 if fits else 2 * SUMS)

"""The Triton kernels of the distillation losses against float64: values, every gradient, NaN samples, splitting."""

from __future__ import annotations

import pytest
import torch

from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.distill_loss import config
from tests import distill_loss_cases as cases
from tests.oracle import TRITON_DEVICE

EACH_LOSS = pytest.mark.parametrize("name", cases.LOSSES)
EACH_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


@EACH_LOSS
@EACH_DTYPE
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_against_float64(shape, dtype, name):
    cases.check(name, cases.make(shape, dtype, weighted=len(shape) == 2), TRITON_DEVICE, "triton")


@EACH_LOSS
def test_channels_last_and_weights(name):
    case = cases.make((3, 3, 8, 8), torch.float32, weighted=True, channels_last=True)
    cases.check(name, case, TRITON_DEVICE, "triton")


@EACH_LOSS
@EACH_DTYPE
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 3, 64, 64)], ids=str)
def test_nan_samples(shape, dtype, name):
    case = cases.with_nan(cases.make(shape, dtype), ("images", 0), ("y_real", 1), ("y_fake", 3))
    cases.check(name, case, TRITON_DEVICE, "triton")


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32, 32), (1, 4, 128, 128)], ids=str)
def test_both_at_once(shape, dtype):
    cases.check_both(cases.make(shape, dtype), TRITON_DEVICE, "triton")
    cases.check_both(cases.make(shape, dtype, weighted=True), TRITON_DEVICE, "triton")


def test_both_at_once_with_nan():
    case = cases.with_nan(cases.make((4, 3, 8, 8), torch.float32), ("y_real", 1), ("y_fake", 3))
    cases.check_both(case, TRITON_DEVICE, "triton")


def test_the_plan_covers_every_element():
    for batch in (1, 3, 64, 1024):
        for size in (1, 64, 2047, 3072, 12288, 49152, 65536, 1 << 22):
            plan = config.plan(batch, size, KNOWN[90])
            spans = -(-size // plan.span)
            assert plan.span % plan.block == 0 and (spans - 1) * plan.span < size <= spans * plan.span
            assert spans <= config.SPANS and plan.block & (plan.block - 1) == 0

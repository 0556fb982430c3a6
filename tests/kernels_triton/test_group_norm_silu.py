"""The Triton kernels of GroupNorm–SiLU against float64, beside plain torch: values and every gradient."""

from __future__ import annotations

import group_norm_cases as cases
import pytest
import torch

from oracle import TRITON_DEVICE, assert_close
from sign_fast.kernels import dispatch
from sign_fast.kernels.group_norm_silu import launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(inputs: cases.Inputs, backward: bool = True) -> None:
    """Rule 1 for the outputs and, where wanted, for every gradient."""
    wide = inputs.to(torch.float64, leaves=backward)
    ordinary = inputs.to(leaves=backward)
    ours = inputs.to(device=TRITON_DEVICE, leaves=backward)
    before = dispatch.taken.total()
    results = [cases.plain(wide), cases.plain(ordinary), cases.fast(ours)]
    assert dispatch.taken.total() == before + 1
    for want, base, got in zip(*results, strict=True):
        assert_close(got, want, base, "output")
        assert got.is_contiguous(
            memory_format=torch.channels_last if ours.tensors["x"].stride(1) == 1 else torch.contiguous_format
        )
    if backward:
        found = [
            cases.gradients(outputs, inputs) for outputs, inputs in zip(results, (wide, ordinary, ours), strict=True)
        ]
        for name in found[0]:
            assert_close(found[2][name], found[0][name], found[1][name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, size", [(256, 8), (576, 8), (512, 4), (384, 4)])
def test_every_fold(channels, size, dtype):
    check(cases.make((2, channels, size, size), 32, dtype))


def run_with(plan, inputs, monkeypatch):
    monkeypatch.setattr(launches, "plan", lambda call, device: plan)
    check(inputs)

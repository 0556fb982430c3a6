"""Inputs of the sampler step's tests."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sign_fast.kernels import dispatch, extension

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason="the C++ extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(a, b) for a in DTYPES for b in DTYPES]
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
SEEDS = torch.tensor([0, 1, -1, 12345, -(2**63), 2**63 - 1, 1 << 32, -(7 << 40) - 3])


@contextmanager
def by(implementation: str):
    """Inside, every call of the sampler step takes that implementation, and there is at least one."""
    before = dispatch.taken.copy()
    yield
    now = {name for (op, name), n in dispatch.taken.items() if op == "sampler_step" and n > before[op, name]}
    assert now == {implementation}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def views(shape, dtype, kind):
    """A (B, C, H, W) tensor in one of the layouts that callers have."""
    batch, channels, height, width = shape
    if kind == "slice":  # of a network with further outputs
        return torch.randn((batch, channels + 3, height, width)).to(dtype)[:, :channels]
    if kind == "transposed":
        return torch.randn((batch, channels, width, height)).to(dtype).transpose(2, 3)
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[kind == "channels_last"])

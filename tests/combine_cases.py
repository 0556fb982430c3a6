"""Inputs of the combination's tests."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from sign_fast.kernels import dispatch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["nchw", "channels_last", "slice", "transposed"]
SHAPES = [(2, 3, 16, 16), (3, 3, 5, 7), (1, 1, 1, 1), (4, 1, 3, 3), (2, 5, 1, 1)]


@contextmanager
def by(implementation: str):
    """Inside, every combination takes that implementation, and there is at least one."""
    before = dispatch.taken.copy()
    yield
    assert {name for op, name in (dispatch.taken - before) if op == "combine"} == {implementation}


def view(shape, dtype, kind, g):
    """A (B, C, H, W) tensor in one of the layouts that callers have."""
    batch, channels, height, width = shape
    if kind == "slice":  # of a network with further outputs
        return torch.randn((batch, channels + 3, height, width), generator=g).to(dtype)[:, :channels]
    if kind == "transposed":
        return torch.randn((batch, channels, width, height), generator=g).to(dtype).transpose(2, 3)
    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    return torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout)


def make(shape, count, first=0):
    """States of all dtypes and layouts in turn, from the given one on, and coefficients."""
    g = torch.Generator().manual_seed(count)
    states = [
        view(shape, DTYPES[(first + j) % 4], KINDS[(first + j + j // 4) % 4], g)  # each dtype meets each layout
        for j in range(count)
    ]
    return states, torch.randn(count, generator=g, dtype=torch.float64)

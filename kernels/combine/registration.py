"""The combination's torch.ops: schema, shape, Triton on CUDA, plain torch where C++ has not taken the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..device import device_of
from ..launch import run
from ..operators import TAGS, register
from . import reference
from .launches import MOST_STATES, launches_forward

_library = torch.library.Library("sign_fast", "FRAGMENT")
_library.define("combine(Tensor[] states, Tensor coefficients, ScalarType dtype) -> Tensor", tags=TAGS)


def _result(states: list[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """The result without values; a kernel reads as many coefficients and elements as there should be."""
    if not 1 <= len(states) <= MOST_STATES:
        raise ValueError(f"1 to {MOST_STATES} states are needed, not {len(states)}")
    if any(t.shape != states[0].shape for t in states) or states[0].ndim != 4:
        raise ValueError(f"states must be (B, C, H, W) of one shape, not {[tuple(t.shape) for t in states]}")
    if coefficients.dtype != torch.float64 or coefficients.shape != (len(states),):
        raise ValueError(f"coefficients must be ({len(states)},) float64")
    first = states[0]
    return torch.empty(first.shape, dtype=dtype, device=first.device, memory_format=suggest_memory_format(first))


def _triton(states: list[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    y = _result(states, coefficients, dtype)
    if y.numel():
        dense = [t.contiguous(memory_format=suggest_memory_format(states[0])) for t in states]
        run(launches_forward(dense, coefficients.contiguous(), y, device_of(y)), y.device)
    return y


def _plain(states: list[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    return _result(states, coefficients, dtype).copy_(reference.combine(states, coefficients, dtype))


call = register(_library, {"combine": (_result, _triton, _plain)})

"""Dispatch of the combination: Triton on NVIDIA GPUs, C++ on the CPU, plain torch for gradients and the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import extension
from ..device import interpreting, supports_triton
from ..dispatch import COMPILING, DTYPES, TRANSFORMED, Reason, fall_back, taken, transformed
from . import reference
from .launches import MOST_STATES, launches_forward
from .registration import call

__all__ = ["MOST_STATES", "combine", "launches_forward", "supports"]

_DTYPES = DTYPES | {torch.float64}
_GRADIENTS = Reason("gradients are wanted: plain torch differentiates it")
_NOT_FAST_DTYPE = Reason("states and result are not all float64, float32, bfloat16 or float16")


def supports(states: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Reason | None:
    """None when a fast version takes the call, otherwise why not."""
    if transformed():
        return TRANSFORMED
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*states, coefficients)):
        return _GRADIENTS
    if not _DTYPES.issuperset((dtype, *(t.dtype for t in states))):
        return _NOT_FAST_DTYPE
    if states[0].is_cpu and not interpreting():
        return COMPILING if torch.compiler.is_compiling() else extension.missing()
    return supports_triton(states[0])


def combine(states: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    reason = supports(states, coefficients, dtype)
    if not torch.compiler.is_compiling():
        if reason is not None:
            fall_back("combine", reason)
        fast = "cpp" if states[0].is_cpu and not interpreting() else "triton"
        taken["combine", fast if reason is None else "reference"] += 1
    if reason is None:
        return call("combine", list(states), coefficients, dtype)
    y = reference.combine(states, coefficients, dtype)
    return y.clone(memory_format=suggest_memory_format(states[0]))  # contiguous() would leave some odd strides

"""A linear combination of states in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(states: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ coefficients[j]·states[j], added from the left: in float64 where dtype is, else in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, *others = coefficients.to(wide).unbind()
    total = first * states[0].to(wide)
    for coefficient, state in zip(others, states[1:], strict=True):
        total = total + coefficient * state.to(wide)
    return total.to(dtype)

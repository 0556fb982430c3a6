"""Dispatch of attention: PyTorch's fused scaled-dot-product attention, which is flash-style on CPU and CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Reason, taken
from . import reference


def supports(q: Tensor) -> Reason | None:
    """None when the fused attention takes this call, otherwise why not."""
    if q.dtype == torch.float64:
        return Reason("float64 is for checking only")
    return None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if supports(q) is not None:
        return reference.attention(q, k, v)
    if not torch.compiler.is_compiling():
        taken["attention", "sdpa"] += 1
    if q.stride(-1) != 1:  # the fused kernels read rows; a copy costs less than the unfused path
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    # a heads axis of one: without it PyTorch picks the unfused path, which forms the T×T matrix
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

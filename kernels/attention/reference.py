"""Attention in plain torch with the softmax in fp32 (float64 inputs stay float64)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (…, T, d) -> (…, T, d)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # it would take the products out of float32
            return _attention(q, k, v, wide)
    return _attention(q, k, v, wide)


def _attention(q: Tensor, k: Tensor, v: Tensor, wide: torch.dtype) -> Tensor:
    logits = torch.einsum("...qd,...kd->...qk", q.to(wide), (k / q.shape[-1] ** 0.5).to(wide))
    return torch.einsum("...qk,...kd->...qd", logits.softmax(dim=-1).to(v.dtype), v)

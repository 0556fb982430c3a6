"""GroupNorm–SiLU in plain torch: statistics in fp32 (float64 inputs stay float64), one rounding at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _group_mean(x: Tensor, num_groups: int) -> Tensor:
    return x.unflatten(1, (num_groups, -1)).mean((2, 3, 4), keepdim=True)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    emb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def per_channel(t: Tensor) -> Tensor:
        return t.to(wide).reshape(*t.shape, 1, 1)

    y = x.to(wide)
    if emb is not None:
        y = y + per_channel(emb)
    if y.device.type == "cpu" and not y.is_contiguous():
        # torch's channels_last CPU norm takes E[x²] − E[x]², which a large mean ruins; the norm does not see a shift
        y = (y.unflatten(1, (num_groups, -1)) - _group_mean(y.detach(), num_groups)).flatten(1, 2)
    y = F.group_norm(
        y, num_groups, None if weight is None else weight.to(wide), None if bias is None else bias.to(wide), eps
    )
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def residual_group_norm_silu(
    h: Tensor,
    skip: Tensor,
    bias: Tensor | None,
    skip_scale: float,
    num_groups: int,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    r = h.to(wide) + skip.to(wide)
    if bias is not None:
        r = r + bias.to(wide).reshape(1, -1, 1, 1)
    r = (r * skip_scale).to(h.dtype)
    return r, group_norm_silu(r, num_groups, weight, norm_bias, eps, silu=silu)

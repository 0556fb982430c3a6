"""GroupNorm–SiLU in plain torch: statistics in fp32 (float64 inputs stay float64), one rounding at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(C,), (1, C) or (B, C) -> broadcastable to (B, C, H, W)."""
    return t.to(dtype).reshape(-1, t.shape[-1], 1, 1)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    return x.unflatten(1, (num_groups, -1))


def _input(x: Tensor, x2: Tensor | None, emb: Tensor | None, input_bias: Tensor | None) -> Tensor:
    """u = concat(x, x2) + emb + input_bias in the wide type."""
    wide = _wide(x)
    u = x.to(wide) if x2 is None else torch.cat([x.to(wide), x2.to(wide)], dim=1)
    for t in (emb, input_bias):
        if t is not None:
            u = u + _per_channel(t, wide)
    return u


def group_norm_silu(
    x: Tensor,
    x2: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    emb: Tensor | None = None,
    input_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    wide = _wide(x)
    u = _grouped(_input(x, x2, emb, input_bias), num_groups)
    axes = (2, 3, 4)
    # F.group_norm's gradients fail or crash for some arguments, and E[x²] − E[x]² loses a large mean's digits;
    # the norm does not see a shift, so that the rough mean needs no gradient
    u = u - u.detach().mean(axes, keepdim=True)
    u = u - u.mean(axes, keepdim=True)
    y = (u * (u.square().mean(axes, keepdim=True) + eps).rsqrt()).flatten(1, 2)
    if weight is not None:
        y = y * _per_channel(weight, wide)
    if bias is not None:
        y = y + _per_channel(bias, wide)
    if scale is not None:
        y = y * (1 + _per_channel(scale, wide))
    if shift is not None:
        y = y + _per_channel(shift, wide)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def join(h: Tensor, skip: Tensor, bias: Tensor | None, skip_scale: float) -> Tensor:
    """r = (h + bias + skip)·skip_scale, rounded to h's type."""
    r = h.to(_wide(h)) + skip.to(_wide(h))
    if bias is not None:
        r = r + _per_channel(bias, r.dtype)
    return (r * skip_scale).to(h.dtype)


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
    r = join(h, skip, bias, skip_scale)
    return r, group_norm_silu(r, None, num_groups, weight, norm_bias, eps, silu=silu)


def statistics(
    x: Tensor, x2: Tensor | None, num_groups: int, eps: float, emb: Tensor | None, input_bias: Tensor | None
) -> Tensor:
    """(B, G, 3): the mean in two parts, so that a large one keeps its digits, and 1/√(var + ε)."""
    u = _grouped(_input(x, x2, emb, input_bias), num_groups)
    rough = u.mean((2, 3, 4), keepdim=True)
    rest = (u - rough).mean((2, 3, 4), keepdim=True)
    rstd = ((u - rough - rest).square().mean((2, 3, 4)) + eps).rsqrt()
    return torch.stack([rough.flatten(1), rest.flatten(1), rstd], dim=2)


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    stats: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    emb: Tensor | None,
    input_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    stream: Tensor | None,
    skip_scale: float,
    input_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dx2, sums); every other gradient follows from sums (3, B, C), the pixel sums of dv, dv·xhat and dx.

    dx is (the norm's input gradient + stream)·skip_scale; v = xhat·gain + offset is the SiLU's argument.
    """
    wide = _wide(x)
    rough, rest, rstd = (t.reshape(*t.shape, 1, 1, 1) for t in stats.to(wide).unbind(2))
    u = _grouped(_input(x, x2, emb, input_bias), num_groups)
    xhat = ((u - rough - rest) * rstd).flatten(1, 2)
    one = xhat.new_ones(1, 1, 1, 1)
    adaptive = one if scale is None else 1 + _per_channel(scale, wide)
    gain = (one if weight is None else _per_channel(weight, wide)) * adaptive
    dv = dy.to(wide)
    if silu:
        v = xhat * gain
        if bias is not None:
            v = v + _per_channel(bias, wide) * adaptive
        if shift is not None:
            v = v + _per_channel(shift, wide)
        s = v.sigmoid()
        dv = dv * (s * (1 + v * (1 - s)))
    dxhat = _grouped(dv * gain, num_groups)
    grouped = _grouped(xhat, num_groups)
    axes = (2, 3, 4)
    total = dxhat - dxhat.mean(axes, keepdim=True) - grouped * (dxhat * grouped).mean(axes, keepdim=True)
    total = (total * rstd).flatten(1, 2)
    if stream is not None:
        total = total + stream.to(wide)
    total = total * skip_scale
    third = total.sum((2, 3)) if input_sum else torch.zeros_like(total[:, :, 0, 0])
    sums = torch.stack([dv.sum((2, 3)), (dv * xhat).sum((2, 3)), third])
    first, second = total.split([x.shape[1], total.shape[1] - x.shape[1]], dim=1)
    dx = torch.empty_like(x, memory_format=torch.preserve_format).copy_(first)
    return dx, second.to(x.dtype) if x2 is None else torch.empty_like(x2).copy_(second), sums


def parameter_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From sums (3, B, C): dweight, dbias and the batch sum of the third as (3, C); dscale (B, C) or empty."""
    dv, dv_xhat, dinput = sums.unbind(0)
    adaptive = 1 if scale is None else 1 + scale.to(sums.dtype)
    vectors = torch.stack([(dv_xhat * adaptive).sum(0), (dv * adaptive).sum(0), dinput.sum(0)])
    if scale is None:
        return vectors, sums.new_empty(0)
    dscale = dv_xhat.clone() if weight is None else dv_xhat * weight.to(sums.dtype)  # an operator returns no view
    return vectors, dscale if bias is None else dscale + dv * bias.to(sums.dtype)

"""Exponential moving average of the weights, with half-life and ramp-up in images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ema_beta(batch: int, images_seen: int, halflife: float, rampup_ratio: float | None) -> float:
    """β = ½^(batch/max(h, 1e-8)) with h = min(halflife, rampup_ratio·images_seen) (EDM).

    Args:
        batch: images of this update.
        images_seen: images before this update, so that the first update copies the weights.
        halflife: in images.
        rampup_ratio: None for no ramp-up.
    """
    h = halflife if rampup_ratio is None else min(halflife, rampup_ratio * images_seen)
    return float(0.5 ** (batch / max(h, 1e-8)))


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, beta: float) -> None:
    """ema ← β·ema + (1 − β)·net for parameters; buffers are copied."""
    average_weights([p.detach() for p in ema.parameters()], [p.detach() for p in net.parameters()], beta)
    for a, b in zip(ema.buffers(), net.buffers(), strict=True):
        a.copy_(b)


@torch.no_grad()
def average_weights(averaged: list[Tensor], current: list[Tensor], beta: float) -> None:
    """averaged ← β·averaged + (1 − β)·current, in place."""
    torch._foreach_lerp_(averaged, current, 1 - beta)

"""The convolution in plain torch, with the resampling before it: nearest ×2, or the mean of 2×2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def resample(x: Tensor, resampling: str) -> Tensor:
    if resampling == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if resampling == "down" else x


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, resampling: str = "none") -> Tensor:
    return F.conv2d(resample(x, resampling), weight, bias, padding=weight.shape[-1] // 2)


def input_gradient(dy: Tensor, weight: Tensor, resampling: str) -> Tensor:
    dx = F.conv_transpose2d(dy, weight, padding=weight.shape[-1] // 2)
    if resampling == "up":
        return F.avg_pool2d(dx, 2) * 4
    return F.interpolate(dx, scale_factor=2, mode="nearest") / 4 if resampling == "down" else dx


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, resampling: str, bias: bool) -> tuple[Tensor, Tensor]:
    """(dweight, dbias), the latter empty where none is wanted."""
    padding = weight.shape[-1] // 2
    dweight = conv2d_weight(resample(x, resampling), list(weight.shape), dy, padding=padding)
    return dweight, dy.sum((0, 2, 3)) if bias else dy.new_empty(0)

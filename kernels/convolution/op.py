"""Dispatch of the convolution: C++ for float32 on the CPU, plain torch (on CUDA cuDNN) for the rest; its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..dispatch import COMPILING, TRANSFORMED, Reason, fall_back, taken, transformed
from ..needed import needed
from . import reference, registration
from .registration import OptionalTensor

__all__ = ["convolution", "supports"]

_LIBRARY = Reason("the device's own library convolves")
_DTYPE = Reason("C++ convolves in float32")
_KERNEL = Reason("C++ convolves with kernels of 1×1 and 3×3")
_EMPTY = Reason("there is no batch of images, or an image or a filter has no elements")
_ODD = Reason("the mean of 2×2 of an image with odd sides leaves some out")
_AUTOCAST = Reason("autocast chooses the type of convolutions")


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: OptionalTensor, resampling: str) -> Tensor:
        # a frozen filter's gradient is never computed: nothing keeps x for it
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.resampling = resampling
        return registration.forward(x, weight, bias, resampling)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = needed(ctx)
        # plain torch's gradients can be differentiated again (create_graph=True)
        gradients: Any = reference if torch.is_grad_enabled() else registration
        dx = gradients.input_gradient(dy, weight, ctx.resampling) if for_x else None
        dweight = dbias = None
        if for_weight:
            dweight, dbias = gradients.weight_gradient(dy, x, weight, ctx.resampling, for_bias)
        elif for_bias:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias if for_bias else None, None


def supports(x: Tensor, weight: Tensor, bias: OptionalTensor, resampling: str = "none") -> Reason | None:
    """None when C++ takes this call, otherwise why not."""
    if torch.compiler.is_compiling():
        return COMPILING
    if not x.is_cpu:
        return _LIBRARY
    if torch.is_autocast_enabled("cpu"):
        return _AUTOCAST
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return _DTYPE
    if weight.shape[2:] not in ((1, 1), (3, 3)):
        return _KERNEL
    if x.ndim != 4 or 0 in x.shape[1:] or 0 in weight.shape:
        return _EMPTY
    if resampling == "down" and (x.shape[2] % 2 or x.shape[3] % 2):
        return _ODD
    if transformed():
        return TRANSFORMED
    return extension.missing()


def convolution(x: Tensor, weight: Tensor, bias: OptionalTensor, resampling: str = "none") -> Tensor:
    reason = supports(x, weight, bias, resampling)
    if reason is not None:
        if reason is not COMPILING:
            fall_back("convolution", reason)
        return reference.convolution(x, weight, bias, resampling)
    taken["convolution", "cpp"] += 1
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Convolution.apply(x, weight, bias, resampling)  # type: ignore[no-any-return, no-untyped-call]
    return registration.forward(x, weight, bias, resampling)  # type: ignore[no-any-return]

"""Dispatch of attention, Triton on NVIDIA GPUs, PyTorch's flash attention on the CPU, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import interpreting, supports_triton
from ..dispatch import DTYPES, NOT_FAST_DTYPE, TRANSFORMED, Reason, fall_back, taken, transformed
from ..second_derivatives import differentiable_backward
from . import reference
from .launches import launches_backward, launches_forward
from .registration import call, split

__all__ = ["attention", "launches_backward", "launches_forward", "projected_attention", "supports"]

_WIDTH = Reason("the attention kernels take d up to 256")


def supports(q: Tensor, channels: int) -> Reason | None:
    """None when a fast version takes this call, Triton on a GPU or PyTorch's flash attention on the CPU."""
    if q.dtype not in DTYPES:
        return NOT_FAST_DTYPE
    if transformed():
        return TRANSFORMED
    if q.is_cpu and not interpreting():
        return None
    return supports_triton(q) or (None if channels <= 256 else _WIDTH)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logsumexp = call("attention_forward", q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable_backward(reference.attention, (q, k, v), ctx.needs_input_grad, dout)
        return call("attention_backward", dout, q, k, v, out, logsumexp)  # type: ignore[no-any-return]


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
        out, logsumexp = call("projected_attention_forward", qkv, num_heads, interleaved)
        ctx.save_for_backward(qkv, out, logsumexp)
        ctx.num_heads, ctx.interleaved = num_heads, interleaved
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def again(x: Tensor) -> Tensor:
                return _plain_projected(x, ctx.num_heads, ctx.interleaved)

            return (*differentiable_backward(again, (qkv,), (True,), dout), None, None)
        arguments = (dout, qkv, out, logsumexp, ctx.num_heads, ctx.interleaved)
        return call("projected_attention_backward", *arguments), None, None


def _plain_projected(qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    batch, channels, height, width = qkv.shape
    a = reference.attention(*split(qkv.contiguous(), num_heads, interleaved))
    return a.transpose(2, 3).reshape(batch, channels // 3, height, width)


def _count(q: Tensor) -> None:
    if not torch.compiler.is_compiling():
        taken["attention", "flash" if q.is_cpu and not interpreting() else "triton"] += 1


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, heads, T, d), any strides."""
    reason = supports(q, q.shape[-1])
    if reason is not None:
        if not torch.compiler.is_compiling():
            fall_back("attention", reason)
        return reference.attention(q, k, v)
    _count(q)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]
    return call("attention", q, k, v)  # type: ignore[no-any-return]


def projected_attention(qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """qkv (B, 3·heads·d, H, W) -> (B, heads·d, H, W)."""
    reason = supports(qkv, qkv.shape[1] // (3 * num_heads))
    if reason is not None:
        if not torch.compiler.is_compiling():
            fall_back("attention", reason)
        return _plain_projected(qkv, num_heads, interleaved)
    _count(qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _ProjectedAttention.apply(qkv, num_heads, interleaved)  # type: ignore[no-any-return, no-untyped-call]
    return call("projected_attention", qkv, num_heads, interleaved)  # type: ignore[no-any-return]

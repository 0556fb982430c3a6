"""Attention as Triton launches: from (B, heads, T, d) tensors, real or on the meta device, to what runs on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..device import Device, interpreting
from ..launch import Kernels, Launch
from .config import Plan, plan

_kernels = Kernels("attention.triton_kernels")

_LOG2_E = 1.4426950408889634


def _named(**tensors: Tensor) -> dict[str, int]:
    """name_batch, name_head, name_token, name_channel: every tensor's strides."""
    axes = ("batch", "head", "token", "channel")
    return {f"{name}_{axis}": step for name, t in tensors.items() for axis, step in zip(axes, t.stride(), strict=True)}


def _strided(*tensors: Tensor) -> bool:
    return any(t.stride(3) != 1 for t in tensors)


def _constants(q: Tensor, k: Tensor, v: Tensor, chosen: Plan) -> dict[str, Any]:
    tokens, channels = q.shape[2:]
    return {
        "D": channels,
        "BLOCK_D": chosen.block_channels,
        "BLOCK_Q": chosen.block_queries,
        "BLOCK_K": chosen.block_keys,
        "EVEN": tokens % chosen.block_queries == 0 and tokens % chosen.block_keys == 0,
        # float32 products in float32: tf32 is not what a float32 network was asked for
        "PRECISION": "widened" if interpreting() else "ieee",
        "STAGES": chosen.num_stages,
        "INTERLEAVED": q.stride(3) == k.stride(3) == v.stride(3) == 3,
    }


def launches_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor | None, device: Device
) -> list[Launch]:
    """One launch into out and, where given, logsumexp (B, heads, T) float32."""
    batch, heads, tokens, channels = q.shape
    chosen = plan("forward", tokens, channels, q.element_size(), batch * heads, device, _strided(q, k, v))
    blocks = -(-tokens // chosen.block_queries)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "logsumexp": logsumexp,
        "blocks": blocks,
        "heads": heads,
        "tokens": tokens,
        "log2_scale": _LOG2_E / math.sqrt(channels),
        **_named(q=q, k=k, v=v, out=out),
    }
    return [
        Launch(_kernels.forward, (blocks * batch * heads,), arguments, _constants(q, k, v, chosen), chosen.num_warps)
    ]


def launches_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    device: Device,
) -> list[Launch]:
    """dq first, which writes Σ dout·out for the launch of dk and dv."""
    batch, heads, tokens, channels = q.shape
    delta = torch.empty_like(logsumexp)
    shared: dict[str, Any] = {
        "dout": dout,
        "q": q,
        "k": k,
        "v": v,
        "logsumexp": logsumexp,
        "delta": delta,
        "heads": heads,
        "tokens": tokens,
        "scale": 1 / math.sqrt(channels),
        "log2_scale": _LOG2_E / math.sqrt(channels),
        **_named(q=q, k=k, v=v, dout=dout),
    }
    launches = []
    chosen = plan("backward_query", tokens, channels, q.element_size(), batch * heads, device, _strided(q, k, v))
    blocks = -(-tokens // chosen.block_queries)
    launches.append(
        Launch(
            _kernels.backward_query,
            (blocks * batch * heads,),
            {**shared, "blocks": blocks, "out": out, "dq": dq, **_named(out=out, dq=dq)},
            {
                **_constants(q, k, v, chosen),
                "KEYS_FIRST": q.element_size() == 4,
                "TO_INTERLEAVED": dq.stride(3) == 3,
                "HALVES": q.element_size() == 2 and channels > 128 and _strided(v),
            },
            chosen.num_warps,
        )
    )
    chosen = plan("backward_key", tokens, channels, q.element_size(), batch * heads, device, _strided(q, k, v))
    blocks = -(-tokens // chosen.block_keys)
    launches.append(
        Launch(
            _kernels.backward_key,
            (blocks * batch * heads,),
            {**shared, "blocks": blocks, "dk": dk, "dv": dv, **_named(dk=dk, dv=dv)},
            {**_constants(q, k, v, chosen), "TO_INTERLEAVED": dk.stride(3) == dv.stride(3) == 3},
            chosen.num_warps,
        )
    )
    return launches

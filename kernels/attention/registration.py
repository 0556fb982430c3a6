"""The torch.ops of attention: schemas, shapes, Triton on CUDA, PyTorch's fused attention on the CPU.

logsumexp is what the backward of the same device reads: of base 2 on a GPU, natural on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..device import device_of
from ..launch import run
from ..operators import TAGS, register
from . import reference
from .launches import launches_backward, launches_forward

_library = torch.library.Library("sign_fast", "FRAGMENT")
_define = partial(_library.define, tags=TAGS)
_define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_define("attention_forward(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor logsumexp)")
_define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
_define("projected_attention(Tensor qkv, int num_heads, bool interleaved) -> Tensor")
_define("projected_attention_forward(Tensor qkv, int num_heads, bool interleaved) -> (Tensor out, Tensor logsumexp)")
_define(
    "projected_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor logsumexp, int num_heads, "
    "bool interleaved) -> Tensor"
)


# ---- a projection's rows as (B, heads, T, d) views ----


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """(B, heads·d, H, W) -> (B, heads, T, d), a view of a dense tensor."""
    batch, channels, height, width = x.shape
    if x.is_contiguous():
        return x.view(batch, num_heads, channels // num_heads, height * width).transpose(2, 3)
    return x.permute(0, 2, 3, 1).view(batch, height * width, num_heads, channels // num_heads).transpose(1, 2)


def split(qkv: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, heads, T, d) views of (B, 3·heads·d, H, W), rows ((head·d) + c)·3 + {0, 1, 2} if interleaved."""
    if interleaved:
        rows = heads_of(qkv, num_heads).unflatten(3, (-1, 3))
        return rows[..., 0], rows[..., 1], rows[..., 2]
    rows = heads_of(qkv, 3 * num_heads)
    q, k, v = rows.chunk(3, dim=1)
    return q, k, v


# ---- shapes ----


def _fake_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token-major memory: what follows is a projection of each token."""
    batch, heads, tokens, channels = q.shape
    return q.new_empty((batch, tokens, heads, channels)).transpose(1, 2)


def _fake_logsumexp(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_attention(q, k, v), _fake_logsumexp(q)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_attention(q, k, v), _fake_attention(q, k, v), _fake_attention(q, k, v)


def _fake_projected(qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    batch, channels, height, width = qkv.shape
    layout = suggest_memory_format(qkv)
    return torch.empty((batch, channels // 3, height, width), dtype=qkv.dtype, device=qkv.device, memory_format=layout)


def _fake_projected_forward(qkv: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    tokens = qkv.shape[2] * qkv.shape[3]
    logsumexp = qkv.new_empty((qkv.shape[0], num_heads, tokens), dtype=torch.float32)
    return _fake_projected(qkv, num_heads, interleaved), logsumexp


def _fake_projected_backward(dout: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(_dense(qkv))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=suggest_memory_format(x))


# ---- Triton ----


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, *, save: bool = True) -> tuple[Tensor, Tensor]:
    out, logsumexp = _fake_forward(q, k, v)
    if out.numel():
        run(launches_forward(q, k, v, out, logsumexp if save else None, device_of(q)), q.device)
    return out, logsumexp


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _triton_forward(q, k, v, save=False)[0]


def _triton_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(dout, q, k, v)
    if out.numel():
        run(launches_backward(dout, q, k, v, out, logsumexp, *gradients, device_of(q)), q.device)
    return gradients


def _triton_projected_forward(
    qkv: Tensor, num_heads: int, interleaved: bool, *, save: bool = True
) -> tuple[Tensor, Tensor]:
    qkv = _dense(qkv)
    out, logsumexp = _fake_projected_forward(qkv, num_heads, interleaved)
    if out.numel():
        q, k, v = split(qkv, num_heads, interleaved)
        views = (heads_of(out, num_heads), logsumexp if save else None)
        run(launches_forward(q, k, v, *views, device_of(qkv)), qkv.device)
    return out, logsumexp


def _triton_projected(qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    return _triton_projected_forward(qkv, num_heads, interleaved, save=False)[0]


def _triton_projected_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, num_heads: int, interleaved: bool
) -> Tensor:
    qkv = _dense(qkv)
    gradient = torch.empty_like(qkv)
    if out.numel():
        upstream = heads_of(dout.contiguous(memory_format=suggest_memory_format(qkv)), num_heads)
        q, k, v = split(qkv, num_heads, interleaved)
        dq, dk, dv = split(gradient, num_heads, interleaved)
        saved = (heads_of(out, num_heads), logsumexp)
        run(launches_backward(upstream, q, k, v, *saved, dq, dk, dv, device_of(qkv)), qkv.device)
    return gradient


# ---- the CPU: PyTorch's flash attention, itself vectorised with at::vec and parallel ----


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()  # it reads rows; a copy costs less than the unfused path


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not q.numel():  # which it divides by
        return _fake_forward(q, k, v)
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(_rows(q), _rows(k), _rows(v))
    return _token_major(out), logsumexp.contiguous()


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _cpu_forward(q, k, v)[0]


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        return _fake_backward(dout, q, k, v)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _rows(dout), _rows(q), _rows(k), _rows(v), _rows(out), logsumexp, 0.0, False
    )
    return _token_major(dq), _token_major(dk), _token_major(dv)


def _cpu_projected_forward(qkv: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    out, logsumexp = _cpu_forward(*split(_dense(qkv), num_heads, interleaved))
    return _like_projected(out, qkv), logsumexp


def _cpu_projected(qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    return _cpu_projected_forward(qkv, num_heads, interleaved)[0]


def _like_projected(out: Tensor, qkv: Tensor) -> Tensor:
    """(B, heads, T, d) token-major -> (B, heads·d, H, W) in qkv's memory format."""
    batch, channels, height, width = qkv.shape
    image = out.transpose(1, 2).reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=suggest_memory_format(qkv))


def _cpu_projected_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, num_heads: int, interleaved: bool
) -> Tensor:
    return _projected_gradient(_cpu_backward, dout, qkv, out, logsumexp, num_heads, interleaved)


def _projected_gradient(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    interleaved: bool,
) -> Tensor:
    dense = _dense(qkv)
    upstream = dout.contiguous(memory_format=suggest_memory_format(qkv))
    found = backward(
        heads_of(upstream, num_heads), *split(dense, num_heads, interleaved), heads_of(out, num_heads), logsumexp
    )
    gradient = torch.empty_like(dense)
    for view, value in zip(split(gradient, num_heads, interleaved), found, strict=True):
        view.copy_(value)
    return gradient


# ---- any device, where neither a pack nor Triton has the kernel ----


def _logits(q: Tensor, k: Tensor) -> Tensor:
    return q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _token_major(reference.attention(q, k, v))


def _plain_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _plain(q, k, v), _logits(q, k).logsumexp(-1) / math.log(2)  # as the kernels of the backward pass read it


def _plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # by hand: inside an operator autograd is off
    weights, upstream = _logits(q, k).softmax(-1), dout.float()
    dv = weights.transpose(-2, -1) @ upstream
    through = upstream @ v.float().transpose(-2, -1)
    dlogits = weights * (through - (weights * through).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    found = dlogits @ k.float(), dlogits.transpose(-2, -1) @ q.float(), dv
    dq, dk, dv = (_token_major(t.to(q.dtype)) for t in found)
    return dq, dk, dv


def _plain_projected_forward(qkv: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    out, logsumexp = _plain_forward(*split(_dense(qkv), num_heads, interleaved))
    return _like_projected(out, qkv), logsumexp


def _plain_projected(qkv: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    return _plain_projected_forward(qkv, num_heads, interleaved)[0]


def _plain_projected_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, num_heads: int, interleaved: bool
) -> Tensor:
    return _projected_gradient(_plain_backward, dout, qkv, out, logsumexp, num_heads, interleaved)


_PLAIN: dict[str, Any] = {
    "attention": _plain,
    "attention_forward": _plain_forward,
    "attention_backward": _plain_backward,
    "projected_attention": _plain_projected,
    "projected_attention_forward": _plain_projected_forward,
    "projected_attention_backward": _plain_projected_backward,
}
# name: (shapes, Triton, CPU)
_IMPLEMENTATIONS: dict[str, tuple[Any, Any, Any]] = {
    "attention": (_fake_attention, _triton, _cpu),
    "attention_forward": (_fake_forward, _triton_forward, _cpu_forward),
    "attention_backward": (_fake_backward, _triton_backward, _cpu_backward),
    "projected_attention": (_fake_projected, _triton_projected, _cpu_projected),
    "projected_attention_forward": (_fake_projected_forward, _triton_projected_forward, _cpu_projected_forward),
    "projected_attention_backward": (_fake_projected_backward, _triton_projected_backward, _cpu_projected_backward),
}
call = register(_library, _IMPLEMENTATIONS, "CPU", _PLAIN)

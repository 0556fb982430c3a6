"""A residual sum that brings along the norm of itself, which the next module would otherwise read it again for.

A block's output r = (h + skip)·scale often goes straight into a known norm. `join` then makes r and silu(norm(r)) in
one pass and leaves the second on the first as an attribute; that norm, called with this very tensor, takes it from
there. Whatever else happens to r in between (a new tensor, a change in place, another module) and the norm computes its
own: a wrong guess costs time, never a number. Only where no gradients are recorded: checkpointing counts what modules
save for their backward passes, and would find another number when it runs one again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from .classes import untouched

_ATTRIBUTE = "_sign_fast_normed"


class Follower(NamedTuple):
    """The norm that a module's output goes into, and whether a SiLU follows."""

    norm: nn.GroupNorm
    silu: bool


class _Normed(NamedTuple):
    follower: Follower
    y: Tensor
    version: int


def expects_follower(follower: Follower | None) -> bool:
    """Whether `join` will make the follower's norm in all likelihood."""
    return follower is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def join(h: Tensor, skip: Tensor, scale: float, follower: Follower | None, bias: Tensor | None = None) -> Tensor:
    """(h + bias + skip)·scale; with a follower, whose input it is, its norm is made in the same pass.

    h, skip (B, C, H, W), where there is no follower any equal shape; bias (C,) or None.
    """
    if follower is not None and _carries(h, skip, follower):
        norm = follower.norm
        r, y = functional.residual_group_norm_silu(
            h,
            skip,
            bias,
            scale,
            norm.num_groups,
            norm.weight,
            norm.bias,
            norm.eps,
            activation="silu" if follower.silu else None,
        )
        setattr(r, _ATTRIBUTE, _Normed(follower, y, r._version))
        return r
    if bias is not None:
        h = h + bias.to(h.dtype).reshape(1, -1, 1, 1)
    if scale == 1:
        return skip + h
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or h.ndim != 4 or h.shape != skip.shape:
        return (skip + h) * scale  # a compiler makes one pass of it
    return functional.combine((skip, h), _twice(scale, h.device))


@lru_cache(maxsize=64)
def _twice(scale: float, device: torch.device) -> Tensor:
    # kept, so that a captured graph copies nothing from the CPU; not one that torch.inference_mode() marks
    with torch.inference_mode(False):
        return torch.full((2,), scale, dtype=torch.float64, device=device)


def _carries(h: Tensor, skip: Tensor, follower: Follower) -> bool:
    """Whether `join` makes the follower's norm as well."""
    norm = follower.norm
    return (
        expects_follower(follower)  # compilers know no versions
        and h.ndim == 4
        and h.shape == skip.shape
        and not (h.is_inference() or skip.is_inference())  # which have none either
        # elsewhere (sharded, offloaded to meta or the CPU) the parameters come only with the norm's own call
        and type(norm.weight) is nn.Parameter
        and type(norm.bias) is nn.Parameter
        and norm.weight.device == h.device
        and norm.weight.is_floating_point()
        and norm.weight.itemsize > 1
        and norm.num_channels == h.shape[1]
        and untouched(norm)
    )


def take(x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor | None:
    """norm(x), with a SiLU or not, where the sum that x is has brought it; None otherwise."""
    if torch.compiler.is_compiling():
        return None
    normed: _Normed | None = x.__dict__.pop(_ATTRIBUTE, None)  # x may live on for long as a skip connection
    if normed is None or torch.is_grad_enabled() or normed.version != x._version:
        return None
    return normed.y if normed.follower.norm is norm and normed.follower.silu is silu else None

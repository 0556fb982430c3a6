"""The residual block of both U-Nets: norm, convolution, embedding, norm, convolution, skip, self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..nn import Conv2d, GroupNorm, Linear


class UNetBlock(nn.Module):
    """U-Net block of DDPM++, NCSN++ and ADM (EDM, appendix F), self-attention optional.

    Args:
        in_channels, out_channels: C of input and output.
        emb_channels: width of the embedding, given as (B, emb_channels).
        up, down: resample by 2 in the first convolution and in the skip.
        attention: whether self-attention follows.
        num_heads: its heads; None means out_channels // channels_per_head.
        channels_per_head: used where num_heads is None.
        dropout: probability before the second convolution.
        skip_scale: factor of each residual sum.
        eps: of the norms.
        resample_filter: of the resampling.
        resample_proj: give a resampling skip a 1×1 convolution even where the channels stay.
        adaptive_scale: the embedding scales and shifts after the second norm, instead of being added before it.
        init, init_zero, init_attn: `init_mode`, `init_weight`, `init_bias` of the layers, of the last ones, of qkv.

    With `checkpointing` set, the backward pass computes the block's activations again instead of keeping them.
    """

    checkpointing = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Mapping[str, Any] | None = None,
        init_zero: Mapping[str, Any] | None = None,
        init_attn: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        init = dict(init or {})
        init_zero = dict(init_zero if init_zero is not None else {"init_weight": 0})
        init_attn = dict(init_attn) if init_attn is not None else init
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.emb_channels = emb_channels
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale

        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)

        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample, **init)

        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **init_attn)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W')."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self._forward(x, emb)
        # the state of the random numbers, which a CUDA graph cannot save, matters to dropout only
        drops = self.training and self.dropout > 0
        out: Tensor = checkpoint(self._forward, x, emb, use_reentrant=False, preserve_rng_state=drops)
        return out

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.norm0(x, activation="silu"))
        p = self.affine(emb)
        if self.adaptive_scale:
            scale, shift = p.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift, activation="silu")
        else:
            h = self.norm1(h, emb=p, activation="silu")
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        skip = x if self.skip is None else self.skip(x)
        if not self.num_heads:
            return _scaled_sum(h, skip, self.skip_scale)
        r, y = self.norm2.join(h, skip, self.skip_scale)
        return _scaled_sum(self.proj(functional.projected_attention(self.qkv(y), self.num_heads)), r, self.skip_scale)


def _scaled_sum(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return a + b if scale == 1 else (a + b) * scale

"""Thin modules over `sign_fast.functional`: the layers of the published networks, with their names and state.

Every layer computes in its input's dtype: parameters are cast to it at the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional

InitMode = Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]


def _draw(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    """One draw of the published initialisers (He et al. 2015; Glorot & Bengio 2010), in place: weights are large."""
    if mode == "xavier_uniform":
        return torch.rand(*shape).mul_(2).sub_(1).mul_(math.sqrt(6 / (fan_in + fan_out)))
    if mode == "xavier_normal":
        return torch.randn(*shape).mul_(math.sqrt(2 / (fan_in + fan_out)))
    if mode == "kaiming_uniform":
        return torch.rand(*shape).mul_(2).sub_(1).mul_(math.sqrt(3 / fan_in))
    if mode == "kaiming_normal":
        return torch.randn(*shape).mul_(math.sqrt(1 / fan_in))
    raise ValueError(f"init_mode {mode!r} is unknown: xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal")


class Linear(nn.Module):
    """y = x Wᵀ + b in x's dtype.

    Args:
        in_features, out_features: sizes; x is (…, in_features), y (…, out_features).
        bias: whether there is a b.
        init_mode, init_weight, init_bias: the law of the initial values and the factors of W and b.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        fans = (init_mode, in_features, out_features)
        self.weight = nn.Parameter(_draw([out_features, in_features], *fans).mul_(init_weight))
        self.bias = nn.Parameter(_draw([out_features], *fans).mul_(init_bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Conv2d(nn.Module):
    """Convolution with an optional ×2 resampling before it, in x's dtype.

    Args:
        in_channels, out_channels: C of input and output.
        kernel: odd width k of the square kernel; 0 has no weight and only resamples.
        bias: whether a bias is added last.
        up, down: resample by 2 with the filter f = outer(r, r)/(Σr)², 4f when upsampling.
        resample_filter: r.
        fused_resample: move the padding as SPEC section 1 says, as NCSN++'s residual encoder does.
        init_mode, init_weight, init_bias: as in `Linear`.

    Raises:
        ValueError: up and down together.
    """

    weight: Tensor | None
    bias: Tensor | None
    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ) -> None:
        if up and down:
            raise ValueError("a convolution resamples up or down, not both")
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.fused_resample = fused_resample
        fans = (init_mode, in_channels * kernel**2, out_channels * kernel**2)
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = nn.Parameter(_draw(shape, *fans).mul_(init_weight)) if kernel else None
        self.bias = nn.Parameter(_draw([out_channels], *fans).mul_(init_bias)) if kernel and bias else None
        r = [float(value) for value in resample_filter]
        # numbers, not tensors: on the meta device products of tensors import torch's compiler, a second's work
        f = torch.tensor([[[[a * b / sum(r) ** 2 for b in r] for a in r]]], dtype=torch.float32)
        self.register_buffer("resample_filter", f if up or down else None)
        # [1, 1] is nearest-neighbour up and 2×2 mean down, for which there are operations of their own
        self.box = list(resample_filter) == [1, 1]
        self.resampling: functional.Resampling = "up" if up else "down" if down else "none"

    def _filter(self, x: Tensor) -> Tensor:
        assert self.resample_filter is not None
        return self.resample_filter.to(x.dtype).tile([x.shape[1], 1, 1, 1])

    def _upsample(self, x: Tensor, padding: int) -> Tensor:
        if self.box and padding == 0:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv_transpose2d(x, self._filter(x) * 4, stride=2, padding=padding, groups=x.shape[1])

    def _downsample(self, x: Tensor, padding: int) -> Tensor:
        if self.box and padding == 0:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._filter(x), stride=2, padding=padding, groups=x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        w_pad = 0 if weight is None else weight.shape[-1] // 2
        f_pad = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.fused_resample and weight is not None and self.down:
            wide = functional.convolution(x, weight) if f_pad == 0 else F.conv2d(x, weight, padding=w_pad + f_pad)
            x = self._downsample(wide, 0)
            return x if bias is None else x + bias.reshape(1, -1, 1, 1)
        if self.box and weight is not None:
            return functional.convolution(x, weight, bias, resampling=self.resampling)
        if self.fused_resample and weight is not None and self.up:
            x = self._upsample(x, max(f_pad - w_pad, 0))
            return F.conv2d(x, weight, bias, padding=max(w_pad - f_pad, 0))
        if self.up:
            x = self._upsample(x, f_pad)
        elif self.down:
            x = self._downsample(x, f_pad)
        return x if weight is None else functional.convolution(x, weight, bias)

    def extra_repr(self) -> str:
        kernel = 0 if self.weight is None else self.weight.shape[-1]
        return f"{self.in_channels}, {self.out_channels}, kernel={kernel}, up={self.up}, down={self.down}"


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) with min(num_groups, num_channels // min_channels_per_group) groups.

    Args:
        num_channels: C of the (B, C, H, W) input.
        num_groups, min_channels_per_group: bounds of the group count.
        eps: added to the variance.
    """

    def __init__(
        self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        emb: Tensor | None = None,
        input_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: functional.Activation = None,
    ) -> Tensor:
        """silu(norm(x + emb + input_bias)·(1 + scale) + shift); see `functional.group_norm_silu`."""
        return functional.group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            emb=emb,
            input_bias=input_bias,
            scale=scale,
            shift=shift,
            activation=activation,
        )

    def join(
        self, h: Tensor, skip: Tensor, skip_scale: float, *, activation: functional.Activation = None
    ) -> tuple[Tensor, Tensor]:
        """r = (h + skip)·skip_scale and the norm of r, as (r, y). Shapes: `functional.residual_group_norm_silu`."""
        return functional.residual_group_norm_silu(
            h, skip, None, skip_scale, self.num_groups, self.weight, self.bias, self.eps, activation=activation
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, num_groups={self.num_groups}, eps={self.eps}"


class Attention(nn.Module):
    """Self-attention over the pixels of a (B, 3·C, H, W) projection -> (B, C, H, W), without parameters.

    Args:
        num_heads: C is a multiple of it.
        interleaved: whether q, k and v take turns channel by channel, as in the published networks.
    """

    def __init__(self, num_heads: int, interleaved: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.interleaved = interleaved

    def forward(self, qkv: Tensor) -> Tensor:
        """softmax(qᵀk/√d)·v; see `functional.projected_attention`."""
        return functional.projected_attention(qkv, self.num_heads, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, interleaved={self.interleaved}"


class DistillLoss(nn.Module):
    """The student's and the fake score's losses of the same predictions (SiD, eq. 23 and Algorithm 1).

    Args:
        alpha: 1.2 published, 1.0 for AFHQ.
        sigma_data: the data's standard deviation.
    """

    def __init__(self, alpha: float = 1.2, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.sigma_data = sigma_data

    def forward(
        self, images: Tensor, y_real: Tensor, y_fake: Tensor, sigma: Tensor, *, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(student (B,), fake (B,)); see `functional.distill_losses`."""
        return functional.distill_losses(images, y_real, y_fake, sigma, self.alpha, self.sigma_data, weight=weight)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, sigma_data={self.sigma_data}"


class SamplerStep(nn.Module):
    """scale·D + σ·n with D = c_skip·x + c_out·F and n from each image's seed: what lies between two network calls.

    Args:
        scale, sigma: of the next state; `sigma` without effect where no seeds are given.
    """

    def __init__(self, scale: float = 1.0, sigma: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.sigma = sigma

    def forward(
        self,
        x: Tensor,
        network_output: Tensor | None = None,
        c_skip: Tensor | None = None,
        c_out: Tensor | None = None,
        *,
        seeds: Tensor | None = None,
        step: int = 0,
    ) -> Tensor:
        """The next state (B, C, H, W); see `functional.sampler_step`."""
        return functional.sampler_step(
            x, network_output, c_skip, c_out, seeds=seeds, step=step, scale=self.scale, sigma=self.sigma
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}, sigma={self.sigma}"


class PositionalEmbedding(nn.Module):
    """[cos(x·w), sin(x·w)] with w_j = max_positions^(−j/(half − endpoint)) (Vaswani et al. 2017, section 3.5).

    Args:
        num_channels: width of the output, (B,) -> (B, num_channels).
        max_positions, endpoint: the range of the frequencies.
    """

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - (1 if self.endpoint else 0))
        angle = torch.outer(x, ((1 / self.max_positions) ** exponent).to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[cos(2π·x·freqs), sin(2π·x·freqs)] with fixed normal frequencies (Tancik et al. 2020).

    Args:
        num_channels: width of the output, (B,) -> (B, num_channels).
        scale: standard deviation of the frequencies.
    """

    freqs: Tensor

    def __init__(self, num_channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)

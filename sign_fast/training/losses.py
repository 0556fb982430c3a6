"""Denoising losses of EDM (Karras et al. 2022, table 1), each (net, images, labels, generator) -> (B,) sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[..., Tensor]


def _denoising(
    net: Denoiser,
    images: Tensor,
    sigma: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    noise: Tensor,
    extra: dict[str, Any],
) -> Tensor:
    denoised = net(images + noise * sigma, sigma, labels, **extra)
    return (weight * (denoised - images) ** 2).flatten(1).sum(1)


@dataclass(frozen=True)
class EDMLoss:
    """lnσ ~ N(P_mean, P_std²), w(σ) = (σ² + s²)/(σ s)².

    Args:
        P_mean, P_std: of lnσ.
        sigma_data: s.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def draw(self, normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(σ, w(σ)) from standard draws of shape (B, 1, 1, 1)."""
        sigma = (normal * self.P_std + self.P_mean).exp()
        return sigma, (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class VPLoss:
    """σ(t) = √(exp(½β_d t² + β_min t) − 1) with t ~ U(epsilon_t, 1), w(σ) = 1/σ².

    Args:
        beta_d, beta_min, epsilon_t: of σ(t).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def draw(self, normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(σ, w(σ)) from standard draws of shape (B, 1, 1, 1)."""
        t = 1 + uniform * (self.epsilon_t - 1)
        sigma = (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()
        return sigma, 1 / sigma**2


@dataclass(frozen=True)
class VELoss:
    """lnσ ~ U(ln sigma_min, ln sigma_max), w(σ) = 1/σ².

    Args:
        sigma_min, sigma_max: range of σ.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100

    def draw(self, normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(σ, w(σ)) from standard draws of shape (B, 1, 1, 1)."""
        sigma = self.sigma_min * (uniform * math.log(self.sigma_max / self.sigma_min)).exp()
        return sigma, 1 / sigma**2


Loss = EDMLoss | VPLoss | VELoss
LOSSES: dict[str, type[EDMLoss] | type[VPLoss] | type[VELoss]] = {"edm": EDMLoss, "vp": VPLoss, "ve": VELoss}


def denoising_loss(
    loss: Loss,
    net: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    part: slice = slice(None),
    global_batch: int | None = None,
    **extra: Any,
) -> Tensor:
    """Σ w(σ)·(D(x + σn; σ) − x)² per sample.

    Args:
        loss: which law of σ and weight.
        net: the denoiser, called net(noised, sigma, labels, **extra).
        images: (B, C, H, W) in [-1, 1]; labels (B, label_dim) or None.
        generator: on the images' device; draws for the global batch, of which this process keeps `part`, so that the
            draws do not depend on the number of processes.
        part, global_batch: this process's slice of the global batch; by default all of B.

    Returns:
        (B,) per-sample sums.
    """
    total = global_batch or images.shape[0]
    column = [total, 1, 1, 1]
    normal = torch.randn(column, generator=generator, device=images.device)[part]
    uniform = torch.rand(column, generator=generator, device=images.device)[part]
    noise = torch.randn([total, *images.shape[1:]], generator=generator, device=images.device)[part]
    sigma, weight = loss.draw(normal, uniform)
    return _denoising(net, images, sigma, weight, labels, noise, extra)

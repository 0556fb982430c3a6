"""SiDA: the fake score's encoder as a discriminator without parameters of its own, and its two losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import denoising_weight

LOGIT_LIMIT = 10.0
"""The student's loss clamps logits to ± this."""

Denoiser = Callable[..., Any]


def pooled_logits(features: Tensor, channel_dim: int = 1) -> Tensor:
    """The channel mean, keepdim, at least float32: (B, C, h, w) -> (B, 1, h, w), or tokens (B, T, C) with −1."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.mean(channel_dim, keepdim=True, dtype=wide)


def denoise_and_discriminate(
    net: Denoiser, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, **extra: Any
) -> tuple[Tensor, Tensor]:
    """(D(x; σ), logits) from one forward.

    Args:
        net: a `Precond`, or a wrapper of one that hands keywords on (DDP, FSDP, torch.compile, checkpointing).
        x, sigma, labels, extra: as in `Precond.forward`.

    Returns:
        D (B, C, H, W) and logits (B, 1, h, w), at least float32 whatever the inner network's dtype.
    """
    denoised, h = net(x, sigma, labels, encoder="also", **extra)
    return denoised, pooled_logits(h)


def discriminate(net: Denoiser, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, **extra: Any) -> Tensor:
    """The logits alone, for real images: the decoder does not run. Arguments as in `denoise_and_discriminate`."""
    return pooled_logits(net(x, sigma, labels, encoder="only", **extra))


def cross_entropy(logits: Tensor, real: bool) -> Tensor:
    """BCE of logits (B, …) against 1 (real) or 0, per-sample means over the map: (B,), NaN where a logit is."""
    return F.softplus(-logits if real else logits).flatten(1).mean(1)


def discriminator_loss(
    logit_real: Tensor,
    logit_fake: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Σ_b w(σ_b)·½(BCE(real → 1) + BCE(fake → 0)), each BCE the mean over batch and map (SiDA), as per-sample terms.

    Real and fake images share σ and noise. The published sum is the sum of all w times the batch's mean BCE; here each
    sample has the mean w times its own BCE, the same sum and gradients.

    Args:
        logit_real, logit_fake: (B, 1, h, w), of `discriminate` and `denoise_and_discriminate`.
        sigma: (B,) or (B, 1, 1, 1) noise levels.
        sigma_data: s in w = (σ² + s²)/(σ s)².
        weight: one value, takes the place of the mean w: that of the whole batch where these samples are a part.

    Returns:
        (B,). A sample with a NaN in its real or fake logits counts nothing, in the mean w neither, and sends back zero
        gradient; the mean goes on dividing by B.

    Raises:
        ValueError: the logits' shapes differ, or sigma does not hold B values.
    """
    if logit_real.shape != logit_fake.shape:
        raise ValueError(f"logits of real {tuple(logit_real.shape)} and fake {tuple(logit_fake.shape)} must agree")
    if sigma.numel() != logit_real.shape[0]:
        raise ValueError(f"sigma must hold {logit_real.shape[0]} values, not {sigma.numel()}")
    valid, (logit_real, logit_fake) = valid_samples(logit_real, logit_fake)
    if weight is None:
        weight = (valid * denoising_weight(sigma.to(valid.dtype), sigma_data)).mean()
    return 0.5 * valid * weight * (cross_entropy(logit_real, True) + cross_entropy(logit_fake, False))


def generator_adversarial_loss(
    logits: Tensor, images: Tensor, y_real: Tensor, *, weight: Tensor | None = None
) -> Tensor:
    """Σ_b CHW·BCE(clamp(logit, ±10) → 1)/ω_b, BCE the mean over batch and map (SiDA), as per-sample terms.

    ω = mean|x_g − y_r|, at least 1e-5, without gradient; each sample has the mean 1/ω times its own BCE, the same sum
    and gradients. Its share of the student's loss is ½·lsg_gan·Σ/B, beside ½ of `functional.sid_generator_loss`.

    Args:
        logits: (B, 1, h, w) of the noised student's images, with gradient into them.
        images: (B, C, H, W) the student's images x_g.
        y_real: (B, C, H, W) the teacher's prediction.
        weight: one value, takes the place of the mean 1/ω: that of the whole batch where these samples are a part.

    Returns:
        (B,). A sample with a NaN in any input counts nothing, in the mean 1/ω neither, and sends back zero gradient;
        the mean goes on dividing by B.

    Raises:
        ValueError: images and y_real differ in shape, or the logits are not of B images.
    """
    if images.shape != y_real.shape:
        raise ValueError(f"images {tuple(images.shape)} and y_real {tuple(y_real.shape)} must agree")
    if logits.shape[0] != images.shape[0]:
        raise ValueError(f"logits of {logits.shape[0]} samples, but {images.shape[0]} images")
    valid, (logits, images, y_real) = valid_samples(logits, images.detach(), y_real.detach())
    if weight is None:
        weight = _mean_closeness(valid, images, y_real)
    loss = cross_entropy(logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT), True)
    return images[0].numel() * valid * weight * loss


def mean_closeness(images: Tensor, y_real: Tensor) -> Tensor:
    """The mean of 1/ω over the batch, ω as in `generator_adversarial_loss`; a sample with a NaN counts 0. One value."""
    valid, (images, y_real) = valid_samples(images.detach(), y_real.detach())
    return _mean_closeness(valid, images, y_real)


def _mean_closeness(valid: Tensor, images: Tensor, y_real: Tensor) -> Tensor:
    return (valid / (images - y_real).abs().flatten(1).mean(1).clamp(min=1e-5)).mean()


def valid_samples(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B,) 1, or 0 where a sample has a NaN in any tensor; and the tensors, at least float32, with those samples 0."""
    bad = torch.stack([t.detach().isnan().flatten(1).any(1) for t in tensors]).any(0)
    wide = [t if t.dtype == torch.float64 else t.float() for t in tensors]
    clean = [torch.where(bad.reshape(-1, *[1] * (t.ndim - 1)), t.new_zeros(()), t) for t in wide]
    return (~bad).to(clean[0].dtype), clean

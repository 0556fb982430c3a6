"""The distillation losses in plain torch, per sample, summed over channels and pixels.

A sample with a NaN in any of its inputs counts zero and sends back zero gradient; nothing synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _drop_nan_samples(*tensors: Tensor) -> list[Tensor]:
    bad = torch.stack([t.detach().isnan().flatten(1).any(1) for t in tensors]).any(0)
    return [torch.where(bad.reshape(-1, *[1] * (t.ndim - 1)), t.new_zeros(()), t) for t in tensors]


def _per_sample_sum(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1)


def fake_score_loss(y_fake: Tensor, images: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    y_fake, images = _drop_nan_samples(y_fake, images)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return _per_sample_sum(weight.reshape(-1, *[1] * (images.ndim - 1)) * (y_fake - images) ** 2)


def sid_generator_loss(images: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float) -> Tensor:
    images, y_real, y_fake = _drop_nan_samples(images, y_real, y_fake)
    omega = (images - y_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    gap = y_real - y_fake
    return _per_sample_sum(gap * ((y_real - images) - alpha * gap)) / omega


def distill_losses(
    images: Tensor, y_real: Tensor, y_fake: Tensor, sigma: Tensor, alpha: float, sigma_data: float
) -> tuple[Tensor, Tensor]:
    student = sid_generator_loss(images, y_real, y_fake, alpha)
    return student, fake_score_loss(y_fake, images.detach(), sigma, sigma_data)

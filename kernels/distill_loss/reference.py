"""The distillation losses in plain torch, per sample, summed over channels and pixels.

A sample with a NaN in any of its inputs counts zero and sends back zero gradient; nothing synchronises with the host.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["sid", "matching", "fake"]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _rows(t: Tensor) -> Tensor:
    return t.flatten(1) if t.ndim > 1 else t[:, None]


def drop_nan_samples(*tensors: Tensor) -> list[Tensor]:
    """The tensors, at least float32, with every sample 0 that has a NaN in any of them."""
    bad = torch.stack([_rows(t.detach().isnan()).any(1) for t in tensors]).any(0)
    return [torch.where(bad.reshape(-1, *[1] * (t.ndim - 1)), t.new_zeros(()), _wide(t)) for t in tensors]


def _per_sample_sum(t: Tensor) -> Tensor:
    return _rows(t).sum(1)


def _inverse_omega(images: Tensor, y_real: Tensor) -> Tensor:
    return 1 / _rows((images - y_real).detach().abs()).mean(1).clamp(min=1e-5)


def fake_score_loss(y_fake: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """weight (B,) times the squared error."""
    y_fake, images = drop_nan_samples(y_fake, images)
    return weight * _per_sample_sum((y_fake - images) ** 2)


def sid_generator_loss(
    images: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float, weight: Tensor | None = None
) -> Tensor:
    """weight (B,) takes the place of 1/omega."""
    images, y_real, y_fake = drop_nan_samples(images, y_real, y_fake)
    gap = y_real - y_fake
    weight = _inverse_omega(images, y_real) if weight is None else weight
    return _per_sample_sum(gap * ((y_real - images) - alpha * gap)) * weight


def distribution_matching_loss(images: Tensor, y_real: Tensor, y_fake: Tensor, weight: Tensor | None = None) -> Tensor:
    """½‖g − stop(g − direction)‖² with direction = (y_fake − y_real)·weight, 1/omega if None."""
    images, y_real, y_fake = drop_nan_samples(images, y_real, y_fake)
    weight = _inverse_omega(images, y_real) if weight is None else weight
    direction = ((y_fake - y_real) * weight.reshape(-1, *[1] * (images.ndim - 1))).detach()
    return 0.5 * _per_sample_sum((images - (images - direction).detach()) ** 2)


def forward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: Tensor | None,
    fake_weight: Tensor | None,
    mode: Mode,
) -> tuple[Tensor, Tensor, Tensor]:
    """(student (B,), fake (B,), factors (2, B)).

    factors: 1/omega or the given weight, then 1; both 0 for a NaN sample.
    """
    read = (images, y_fake) if mode == "fake" else (images, y_real, y_fake)
    keep = _wide(1 - torch.stack([_rows(t.isnan()).any(1) for t in read]).any(0).to(torch.int8))
    x, fake = drop_nan_samples(*read)[0], drop_nan_samples(*read)[-1]
    student = factor = torch.zeros_like(keep)
    if mode != "fake":
        real = drop_nan_samples(*read)[1]
        factor = _inverse_omega(x, real) if student_weight is None else _wide(student_weight).to(keep.dtype)
        gap = real - fake
        if mode == "sid":
            student = _per_sample_sum(gap * ((real - x) - alpha * gap)) * factor
        else:
            student = 0.5 * _per_sample_sum((gap * factor.reshape(-1, *[1] * (x.ndim - 1))) ** 2)
    losses = torch.zeros_like(keep) if fake_weight is None else fake_weight * _per_sample_sum((fake - x) ** 2)
    return student * keep, losses * keep, torch.stack([torch.where(keep > 0, factor, 0), keep])


def gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    factors: Tensor,
    student_scale: Tensor,
    fake_scale: Tensor,
    alpha: float,
    mode: Mode,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of Σ student_scale·student + fake_scale·(fake/weight)·weight: for images, y_real, y_fake (student, fake).

    student_scale (B,) multiplies the student loss, fake_scale (B,), which holds the fake loss's weight, the squared
    error. In mode "fake" the images get the squared error's gradient, elsewhere they are data for the fake loss.
    """

    def per_sample(t: Tensor) -> Tensor:
        return t.reshape(-1, *[1] * (images.ndim - 1))

    read = (images, y_fake) if mode == "fake" else (images, y_real, y_fake)
    clean = drop_nan_samples(*read)
    x, fake = clean[0], clean[-1]
    keep = per_sample(factors[1])
    error = 2 * (fake - x) * per_sample(fake_scale) * keep
    zero = torch.zeros_like(error)
    if mode == "fake":
        return -error, zero, zero, error
    gap, residual = clean[1] - fake, clean[1] - x
    if mode == "matching":
        return -gap * per_sample(factors[0] * student_scale) * keep, zero, zero, error
    scale = per_sample(factors[0] * student_scale) * keep
    real = (residual + (1 - 2 * alpha) * gap) * scale
    return -gap * scale, real, (2 * alpha * gap - residual) * scale, error


def losses_and_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: Tensor | None,
    fake_weight: Tensor,
    student_scale: float,
    fake_scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Both losses of mode "sid" and the gradients of student_scale·Σ student + fake_scale·Σ fake, empty if unwanted."""
    three = (images, y_real, y_fake)
    student, fake, factors = forward(*three, alpha, student_weight, fake_weight, "sid")
    scales = (torch.full_like(student, student_scale), fake_scale * fake_weight.to(student.dtype))
    found = gradients(*three, factors, *scales, alpha, "sid")
    kept = [g.to(images.dtype) if want else g.new_empty(0) for g, want in zip(found, (*wanted, True), strict=True)]
    return student, fake, *kept

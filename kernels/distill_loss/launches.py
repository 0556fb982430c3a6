"""The distillation losses as Triton launches: from dense tensors, real or on the meta device, to what runs on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..launch import Kernels, Launch
from . import config
from .reference import Mode

_kernels = Kernels("distill_loss.triton_kernels")

_STUDENT = {"fake": 0, "sid": 1, "matching": 2}


def _size(x: Tensor) -> int:
    return x.numel() // x.shape[0]


def launches_forward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    student: Tensor,
    fake: Tensor,
    factors: Tensor,
    alpha: float,
    student_weight: Tensor | None,
    fake_weight: Tensor | None,
    mode: Mode,
    device: Device,
) -> list[Launch]:
    """Into student (B,), fake (B,) and factors (2, B), all float32."""
    batch, size = images.shape[0], _size(images)
    chosen = config.plan(batch, size, device)
    spans = -(-size // chosen.span)
    constants = {"STUDENT": _STUDENT[mode], "FAKE": fake_weight is not None}
    results: dict[str, Any] = {
        "student_weight": student_weight,
        "fake_weight": fake_weight,
        "student_loss": student,
        "fake_loss": fake,
        "factors": factors,
        "batch": batch,
        "size": size,
    }
    workspace = None if spans == 1 else torch.empty((batch, spans, 4), dtype=torch.float32, device=images.device)
    arguments = {"images": images, "y_real": y_real, "y_fake": y_fake, "workspace": workspace, **results}
    first = Launch(
        _kernels.sums,
        (spans * batch,),
        {**arguments, "span": chosen.span, "spans": spans, "alpha": alpha},
        {**constants, "BLOCK": chosen.block, "WHOLE": spans == 1},
        chosen.num_warps,
    )
    if spans == 1:
        return [first]
    last = {**results, "workspace": workspace, "spans": spans}
    return [first, Launch(_kernels.finish, (batch,), last, {**constants, "BLOCK_S": config.power_of_two(spans)}, 1)]


def launches_backward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    factors: Tensor,
    student_gradient: Tensor | None,
    fake_gradient: Tensor | None,
    fake_weight: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    alpha: float,
    mode: Mode,
    device: Device,
    *,
    student_scale: float = 1.0,
    fake_scale: float = 1.0,
) -> list[Launch]:
    """Into outputs: gradients for images, y_real, y_fake; the fake loss's for y_fake apart, or None to add it there."""
    batch, size = images.shape[0], _size(images)
    chosen = config.elementwise(size)
    blocks = -(-size // chosen.block)
    arguments = {
        "images": images,
        "y_real": y_real,
        "y_fake": y_fake,
        "factors": factors,
        "student_gradient": student_gradient,
        "fake_gradient": fake_gradient,
        "fake_weight": fake_weight,
        "student_scale": student_scale,
        "fake_scale": fake_scale,
        "batch": batch,
        "size": size,
        "blocks": blocks,
        "alpha": alpha,
        **dict(zip(("d_images", "d_real", "d_fake", "d_fake_error"), outputs, strict=True)),
    }
    constants = {"STUDENT": _STUDENT[mode], "FAKE": fake_weight is not None, "APART": outputs[3] is not None}
    return [
        Launch(_kernels.gradients, (blocks * batch,), arguments, {**constants, "BLOCK": chosen.block}, chosen.num_warps)
    ]


def launches_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    student: Tensor,
    fake: Tensor,
    factors: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    alpha: float,
    student_weight: Tensor | None,
    fake_weight: Tensor | None,
    student_scale: float,
    fake_scale: float,
    mode: Mode,
    device: Device,
) -> list[Launch]:
    """Losses and gradients: one read where a sample fits on chip, else the two passes."""
    batch, size = images.shape[0], _size(images)
    chosen = config.on_chip(size, images.element_size(), device)
    if chosen is None:
        three = (images, y_real, y_fake)
        return [
            *launches_forward(*three, student, fake, factors, alpha, student_weight, fake_weight, mode, device),
            *launches_backward(
                *three,
                factors,
                None,
                None,
                fake_weight,
                outputs,
                alpha,
                mode,
                device,
                student_scale=student_scale,
                fake_scale=fake_scale,
            ),
        ]
    arguments = {
        "images": images,
        "y_real": y_real,
        "y_fake": y_fake,
        "student_weight": student_weight,
        "fake_weight": fake_weight,
        "student_scale": student_scale,
        "fake_scale": fake_scale,
        "student_loss": student,
        "fake_loss": fake,
        "factors": factors,
        "batch": batch,
        "size": size,
        "alpha": alpha,
        **dict(zip(("d_images", "d_real", "d_fake", "d_fake_error"), outputs, strict=True)),
    }
    constants = {"STUDENT": _STUDENT[mode], "FAKE": fake_weight is not None, "BLOCK": chosen.block}
    return [Launch(_kernels.losses_and_gradients, (batch,), arguments, constants, chosen.num_warps)]

"""The torch.ops of the distillation losses: schemas, shapes, Triton on CUDA, plain torch where there is no C++.

Bytes decide the shape of these operators. Forward and backward apart read the three inputs twice and write the
gradients once; writing gradients in the forward and scaling them in the backward would read and write them again. Where
the losses' own gradients are known beforehand, as in a training step, `distill_loss_gradients` reads everything once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..device import device_of
from ..launch import run
from ..operators import TAGS, register
from . import reference
from .launches import launches_backward, launches_forward, launches_gradients

OptionalTensor: TypeAlias = Tensor | None

_library = torch.library.Library("sign_fast", "FRAGMENT")
_define = partial(_library.define, tags=TAGS)
_INPUTS = "Tensor images, Tensor y_real, Tensor y_fake"
_WANTED = "bool for_images, bool for_real, bool for_fake"
_define(
    f"distill_loss_forward({_INPUTS}, float alpha, Tensor? student_weight, Tensor? fake_weight, str mode) "
    "-> (Tensor student, Tensor fake, Tensor factors)"
)
_define(
    f"distill_loss_backward({_INPUTS}, Tensor factors, Tensor? student_gradient, Tensor? fake_gradient, "
    f"Tensor? fake_weight, float alpha, str mode, {_WANTED}) -> (Tensor d_images, Tensor d_real, Tensor d_fake)"
)
_define(
    f"distill_loss_gradients({_INPUTS}, float alpha, Tensor? student_weight, Tensor? fake_weight, float student_scale, "
    f"float fake_scale, str mode, {_WANTED}) -> "
    "(Tensor student, Tensor fake, Tensor d_images, Tensor d_real, Tensor d_fake, Tensor d_fake_error)"
)


# ---- shapes ----


def _losses(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = images.shape[0]
    one = images.new_empty(batch, dtype=torch.float32)
    return one, torch.empty_like(one), images.new_empty((2, batch), dtype=torch.float32)


def _wanted(images: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(images) if want else images.new_empty(0) for want in wanted)


def _fake_forward(images: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _losses(images)


def _fake_backward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    factors: Tensor,
    student_gradient: OptionalTensor,
    fake_gradient: OptionalTensor,
    fake_weight: OptionalTensor,
    alpha: float,
    mode: str,
    for_images: bool,
    for_real: bool,
    for_fake: bool,
) -> tuple[Tensor, ...]:
    return _wanted(images, for_images, for_real, for_fake)


def _fake_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: OptionalTensor,
    student_scale: float,
    fake_scale: float,
    mode: str,
    for_images: bool,
    for_real: bool,
    for_fake: bool,
) -> tuple[Tensor, ...]:
    student, fake, _ = _losses(images)
    return student, fake, *_wanted(images, for_images, for_real, for_fake, fake_weight is not None)


# ---- Triton ----


def _present(outputs: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[OptionalTensor, ...]:
    return tuple(t if want else None for t, want in zip(outputs, wanted, strict=True))


def _triton_forward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: OptionalTensor,
    mode: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    results = _losses(images)
    if images.numel():
        three = (images, y_real, y_fake)
        run(
            launches_forward(*three, *results, alpha, student_weight, fake_weight, mode, device_of(images)),
            images.device,
        )
        return results
    return tuple(t.zero_() for t in results)  # type: ignore[return-value]


def _triton_backward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    factors: Tensor,
    student_gradient: OptionalTensor,
    fake_gradient: OptionalTensor,
    fake_weight: OptionalTensor,
    alpha: float,
    mode: Any,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    outputs = _wanted(images, *wanted)
    if images.numel() and any(wanted):
        launches = launches_backward(
            images,
            y_real,
            y_fake,
            factors,
            student_gradient,
            fake_gradient,
            fake_weight,
            (*_present(outputs, wanted), None),  # type: ignore[arg-type]
            alpha,
            mode,
            device_of(images),
        )
        run(launches, images.device)
    return outputs


def _triton_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: OptionalTensor,
    student_scale: float,
    fake_scale: float,
    mode: Any,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    results = _losses(images)
    wanted = (*wanted, fake_weight is not None)
    outputs = _wanted(images, *wanted)
    if not images.numel():
        return (*(t.zero_() for t in results[:2]), *outputs)
    launches = launches_gradients(
        images,
        y_real,
        y_fake,
        *results,
        _present(outputs, wanted),  # type: ignore[arg-type]
        alpha,
        student_weight,
        fake_weight,
        student_scale,
        fake_scale,
        mode,
        device_of(images),
    )
    run(launches, images.device)
    return (*results[:2], *outputs)


# ---- plain torch ----


def _plain_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    student, fake, factors = reference.forward(*arguments)
    return student.float(), fake.float(), factors.float()


def _scales(images: Tensor, *values: Any) -> Tensor:
    total = torch.ones(images.shape[0], dtype=torch.float32, device=images.device)
    for value in values:
        total = total if value is None else total * value
    return total


def _as(images: Tensor, gradients: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    outputs = _wanted(images, *wanted)
    return tuple(out.copy_(g) if want else out for out, g, want in zip(outputs, gradients, wanted, strict=True))


def _plain_backward(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    factors: Tensor,
    student_gradient: OptionalTensor,
    fake_gradient: OptionalTensor,
    fake_weight: OptionalTensor,
    alpha: float,
    mode: Any,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    student = _scales(images, student_gradient)
    fake = _scales(images, fake_gradient, 0.0 if fake_weight is None else fake_weight)
    three = (images, y_real, y_fake)
    d_images, d_real, d_fake, error = reference.gradients(*three, factors, student, fake, alpha, mode)
    return _as(images, (d_images, d_real, d_fake + error if mode != "fake" else error), wanted)


def _plain_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: OptionalTensor,
    student_scale: float,
    fake_scale: float,
    mode: Any,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    three = (images, y_real, y_fake)
    student, fake, factors = _plain_forward(*three, alpha, student_weight, fake_weight, mode)
    scales = (
        _scales(images, student_scale),
        _scales(images, fake_scale, 0.0 if fake_weight is None else fake_weight),
    )
    found = reference.gradients(*three, factors, *scales, alpha, mode)
    return (student, fake, *_as(images, found, (*wanted, fake_weight is not None)))


# name: (shapes, Triton, plain torch)
_IMPLEMENTATIONS: dict[str, tuple[Any, Any, Any]] = {
    "distill_loss_forward": (_fake_forward, _triton_forward, _plain_forward),
    "distill_loss_backward": (_fake_backward, _triton_backward, _plain_backward),
    "distill_loss_gradients": (_fake_gradients, _triton_gradients, _plain_gradients),
}
call = register(_library, _IMPLEMENTATIONS)

"""Dispatch of the distillation losses, Triton on NVIDIA GPUs, C++ on the CPU, plain torch for the rest; gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import extension
from ..device import interpreting, supports_triton
from ..dispatch import COMPILING, DTYPES, NOT_FAST_DTYPE, TRANSFORMED, Reason, fall_back, taken, transformed
from ..needed import needed
from ..second_derivatives import differentiable_backward
from . import reference
from .launches import launches_backward, launches_forward, launches_gradients
from .reference import Mode
from .registration import OptionalTensor, call

__all__ = [
    "distill_loss_gradients",
    "distill_losses",
    "distribution_matching_loss",
    "fake_score_loss",
    "launches_backward",
    "launches_forward",
    "launches_gradients",
    "sid_generator_loss",
    "supports",
]

_MIXED = Reason("the inputs have several dtypes", "give images, y_real and y_fake in one")
_WEIGHTS = Reason("gradients of the weights are wanted: plain torch differentiates them")
_LARGE = Reason("one sample has 2³¹ elements or more")


def supports(images: Tensor, *others: Tensor, weights: tuple[OptionalTensor, ...] = ()) -> Reason | None:
    """None when a fast version takes this call, Triton on a GPU and C++ on the CPU, otherwise why not."""
    if transformed():
        return TRANSFORMED
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in weights):
        return _WEIGHTS
    if any(t.dtype != images.dtype for t in others):
        return _MIXED
    if images.dtype not in DTYPES:
        return NOT_FAST_DTYPE
    if images.is_cpu and not interpreting():
        return COMPILING if torch.compiler.is_compiling() else extension.missing()
    return supports_triton(images) or (_LARGE if images[:1].numel() >= 2**31 else None)


def _fast(images: Tensor, *others: Tensor, weights: tuple[OptionalTensor, ...] = ()) -> bool:
    reason = supports(images, *others, weights=weights)
    if torch.compiler.is_compiling():
        return reason is None
    if reason is not None:
        fall_back("distill_loss", reason)
        return False
    taken["distill_loss", "cpp" if images.is_cpu and not interpreting() else "triton"] += 1
    return True


def _alike(images: Tensor, *others: Tensor) -> list[Tensor]:
    """All of them dense and in images' memory format: then an element is the same place in each."""
    layout = suggest_memory_format(images) if images.ndim in (4, 5) else torch.contiguous_format
    return [t.contiguous(memory_format=layout) for t in (images, *others)]


def _vector(t: OptionalTensor) -> OptionalTensor:
    return None if t is None else t.detach().reshape(-1).float().contiguous()


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        y_real: Tensor,
        y_fake: Tensor,
        alpha: float,
        student_weight: OptionalTensor,
        fake_weight: OptionalTensor,
        mode: Mode,
    ) -> tuple[Tensor, Tensor]:
        student, fake, factors = call(
            "distill_loss_forward", images, y_real, y_fake, alpha, student_weight, fake_weight, mode
        )
        ctx.save_for_backward(images, y_real, y_fake, factors, student_weight, fake_weight)
        ctx.alpha, ctx.mode = alpha, mode
        ctx.set_materialize_grads(False)
        return student, fake

    @staticmethod
    def backward(ctx: Any, for_student: OptionalTensor, for_fake: OptionalTensor) -> tuple[Any, ...]:
        images, y_real, y_fake, factors, student_weight, fake_weight = ctx.saved_tensors
        needs = needed(ctx)[:3]
        if for_student is None:  # the fake loss takes the images as data, but where it is the only loss
            needs = (needs[0] and ctx.mode == "fake", False, needs[2])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            arguments = (images, y_real, y_fake, ctx.alpha, student_weight, fake_weight, ctx.mode)
            wanted = (*needs, *[False] * 4)
            return differentiable_backward(_plain, arguments, wanted, for_student, for_fake)
        # of a loss that nothing was made of nothing is computed: it may be infinite
        mode = "fake" if for_student is None else ctx.mode
        fake_weight = None if for_fake is None else fake_weight
        found = call(
            "distill_loss_backward",
            images,
            y_real,
            y_fake,
            factors,
            None if for_student is None else for_student.contiguous(),
            None if for_fake is None else for_fake.contiguous(),
            fake_weight,
            ctx.alpha,
            mode,
            *needs,
        )
        gradients = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
        return (*gradients, None, None, None, None)


def _plain(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: OptionalTensor,
    mode: Mode,
) -> tuple[OptionalTensor, OptionalTensor]:
    student = fake = None
    if mode == "sid":
        student = reference.sid_generator_loss(images, y_real, y_fake, alpha, student_weight)
    elif mode == "matching":
        student = reference.distribution_matching_loss(images, y_real, y_fake, student_weight)
    if fake_weight is not None:
        data = images if mode == "fake" else images.detach()
        if mode != "fake":  # a NaN in any input drops the sample from both losses
            data, _, y_fake = reference.drop_nan_samples(data, y_real.detach(), y_fake)
        fake = reference.fake_score_loss(y_fake, data, fake_weight)
    return student, fake


def fake_score_loss(y_fake: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """weight (B,) times the per-sample sum of squares."""
    if not _fast(images, y_fake, weights=(weight,)):
        return reference.fake_score_loss(y_fake, images, weight)
    images, y_fake = _alike(images, y_fake)
    return _DistillLoss.apply(images, images.detach(), y_fake, 0.0, None, _vector(weight), "fake")[1]  # type: ignore


def sid_generator_loss(images: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float, weight: OptionalTensor) -> Tensor:
    """weight (B,) or None for 1/omega."""
    if not _fast(images, y_real, y_fake, weights=(weight,)):
        return reference.sid_generator_loss(images, y_real, y_fake, alpha, weight)
    return _DistillLoss.apply(*_alike(images, y_real, y_fake), alpha, _vector(weight), None, "sid")[0]  # type: ignore


def distribution_matching_loss(images: Tensor, y_real: Tensor, y_fake: Tensor, weight: OptionalTensor) -> Tensor:
    """weight (B,) or None for 1/omega; the predictions are data."""
    y_real, y_fake = y_real.detach(), y_fake.detach()
    if not _fast(images, y_real, y_fake, weights=(weight,)):
        return reference.distribution_matching_loss(images, y_real, y_fake, weight)
    return _DistillLoss.apply(*_alike(images, y_real, y_fake), 0.0, _vector(weight), None, "matching")[0]  # type: ignore


def distill_losses(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """(student (B,), fake (B,)); weights (B,), student_weight None for 1/omega."""
    if not _fast(images, y_real, y_fake, weights=(student_weight, fake_weight)):
        return _plain(images, y_real, y_fake, alpha, student_weight, fake_weight, "sid")  # type: ignore[return-value]
    three = _alike(images, y_real, y_fake)
    return _DistillLoss.apply(*three, alpha, _vector(student_weight), _vector(fake_weight), "sid")  # type: ignore


def distill_loss_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    alpha: float,
    student_weight: OptionalTensor,
    fake_weight: Tensor,
    student_scale: float,
    fake_scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """(student, fake, d_images, d_real, d_fake of the student's, d_fake of the fake loss); no autograd."""
    images, y_real, y_fake = _alike(images.detach(), y_real.detach(), y_fake.detach())
    arguments = (
        images,
        y_real,
        y_fake,
        alpha,
        _vector(student_weight),
        _vector(fake_weight),
        student_scale,
        fake_scale,
        "sid",
        *wanted,
    )
    if _fast(images, y_real, y_fake):
        return call("distill_loss_gradients", *arguments)  # type: ignore[no-any-return]
    three, weights = (images, y_real, y_fake), (student_weight, fake_weight)
    with torch.no_grad():
        return reference.losses_and_gradients(*three, alpha, *weights, student_scale, fake_scale, wanted)

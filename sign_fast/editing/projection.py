"""Projection with the time-free student (SIGN): u = (1 − τ0)·y + τ0·ε, x = f(u), then rounds of the same on x."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import SignFastError, whole_number
from ..sampling.engine import Engine
from ..sampling.generator import ImageGenerator
from ..sampling.loop import Correction
from ..sampling.noise import check_seeds
from ..sampling.requests import Labels, Output, check_labels, is_time_free
from ..sampling.students import projection_plan


def noise_levels(noise_level: float, rounds: int) -> tuple[float, ...]:
    """τ_i = τ0·(1 − i/(rounds + 1)), i = 0 … rounds: each round adds less noise than the one before.

    Args:
        noise_level: τ0 in [0, 1]; 0 applies f to the image as it is, 1 forgets it but for what is put back.
        rounds: whole number ≥ 0, of multi-step rounds after the first call.

    Raises:
        SignFastError: out of range.
    """
    if isinstance(noise_level, bool) or not isinstance(noise_level, Real) or not 0 <= float(noise_level) <= 1:
        raise SignFastError(f"the noise level must be a number from 0 to 1, not {noise_level!r}")
    count = whole_number(rounds, "rounds")
    if count < 0:
        raise SignFastError(f"the number of rounds must be 0 or more, not {count}")
    return tuple(float(noise_level) * (1 - i / (count + 1)) for i in range(count + 1))


def project(
    student: Any,
    images: Tensor,
    *,
    noise_level: float = 0.5,
    rounds: int = 0,
    constraint: Correction | None = None,
    labels: Labels = None,
    seeds: Iterable[int] | None = None,
    output: Output = "float",
) -> Tensor:
    """Project images back to what a time-free student knows.

    u = (1 − τ0)·y + τ0·ε0 and x = f(u), then x ← f((1 − τ_i)·x + τ_i·ε_i) for each τ_i of `noise_levels`; after every
    call of f the constraint puts back what is known of y. All of it is one launch, as in `ImageGenerator`.

    Args:
        student: an `ImageGenerator` or `Engine` of a time-free network, or such a network (of which an inference copy
            is then made at every call).
        images: y, (B, C, H, W), floating, in [-1, 1], on any device.
        noise_level: τ0 in [0, 1].
        rounds: multi-step rounds after the first call of f: rounds + 1 calls in all.
        constraint: `KnownPixels`, `Luma`, `PatchMeans`, or a correction of your own.
        labels: a class number, or one an image; needed where the student has classes.
        seeds: one an image, naming its noise, whatever the batch; equal seeds draw equal noise. None means 0 to B − 1.
        output: "float", or "uint8" for bytes.

    Returns:
        (B, C, H, W) float32 in about [-1, 1], or (B, H, W, C) uint8, on the student's device.

    Raises:
        SignFastError: any of these is wrong; nothing has been computed then.
    """
    engine = engine_of(student)
    if not is_time_free(engine.net):
        raise SignFastError("editing needs a network without a noise level, such as digits-sign: this one takes one")
    plan = projection_plan(noise_levels(noise_level, rounds))
    numbers, classes = check_edit(engine, images, seeds, labels, constraint, output)
    return engine.edit(plan, images, numbers, classes, constraint, output)


def engine_of(network: Any) -> Engine:
    """The engine of a generator, the engine itself, or a new one of a network."""
    if isinstance(network, ImageGenerator):
        return network.engine
    return network if isinstance(network, Engine) else Engine(network)


def check_edit(
    engine: Engine,
    images: Tensor,
    seeds: Iterable[int] | None,
    labels: Labels,
    constraint: Correction | None,
    output: str,
) -> tuple[Sequence[int], list[int] | None]:
    """Seeds and class numbers, one an image.

    Raises:
        SignFastError: images, seeds, labels, constraint or output do not fit each other or the network.
    """
    shape = (engine.img_channels, engine.img_resolution, engine.img_resolution)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise SignFastError("images must be a floating tensor (B, C, H, W) in [-1, 1]")
    if tuple(images.shape[1:]) != shape or len(images) == 0:
        raise SignFastError(f"images of shape {tuple(images.shape)} do not fit: this network edits (B, {shape[0]}, "
                            f"{shape[1]}, {shape[2]})")  # fmt: skip
    if images.device.type == "cpu" and not torch.isfinite(images).all():
        raise SignFastError("the images hold NaN or Inf: mend or remove them")
    numbers = check_seeds(range(len(images)) if seeds is None else seeds, noise=engine.noise, allow_duplicates=True)
    if len(numbers) != len(images):
        raise SignFastError(f"{len(numbers)} seeds for {len(images)} images: give one an image")
    if labels is None and engine.label_dim:
        raise SignFastError(f"this network has classes 0 to {engine.label_dim - 1}: say which the images are of")
    if output not in ("uint8", "float"):
        raise SignFastError(f"output must be uint8 or float, not {output!r}")
    check = getattr(constraint, "check", None)
    if check is not None:
        check(images.shape)
    return numbers, check_labels(labels, len(images), engine.label_dim)

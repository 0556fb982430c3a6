"""The edits by name, with noise levels and rounds that suit them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SignFastError
from ..sampling.loop import Correction
from .constraints import KnownPixels, Luma, PatchMeans
from .corruptions import AddedNoise, Blur, Corruption, Edges


@dataclass(frozen=True)
class Task:
    """An edit.

    Args:
        name: as in `TASKS`.
        corruption: what the images have lost; done to clean ones where they are to be measured.
        constraint: what is put back after each network call, or None.
        noise_level: τ0, unless another is given.
        rounds: after the first network call, unless others are given.
        teacher_noise_level: τ0 of the teacher's SDEdit, which is best at another.
    """

    name: str
    corruption: Corruption
    constraint: Correction | None
    noise_level: float
    rounds: int
    teacher_noise_level: float

    def observe(self, images: Tensor) -> Tensor:
        """What is known of images that have been corrupted already: unknown pixels, colours and detail are dropped."""
        return images if self.constraint is None else self.corruption.corrupt(images, ())


TASKS = {
    "denoise": (0.0, 4, 0.2),
    "inpaint": (0.3, 4, 0.4),
    "colorize": (0.0, 4, 0.3),
    "super-resolve": (0.0, 4, 0.3),
    "sketch": (0.8, 0, 0.9),
    "project": (0.0, 0, 0.15),
}
"""Noise level, rounds and the teacher's noise level by the name of the task: those of the highest PSNR of digits-sign
and digits-uncond on digits:train at five network calls, or at one where five are not 0.3 dB better. Digits have no
colour: colorize has the values of super-resolve.
"""


def make_task(name: str, *, known: Tensor | None = None, factor: int = 2, noise_std: float = 0.4) -> Task:
    """A task by name.

    Args:
        name: denoise, inpaint, colorize, super-resolve, sketch, project (anything; measured on blurred images).
        known: the mask of inpaint, see `KnownPixels`.
        factor: of super-resolve.
        noise_std: of the noise that denoise is measured with.

    Raises:
        SignFastError: an unknown name, or an option out of range.
    """
    if name not in TASKS:
        raise SignFastError(f"unknown task {name!r}: known: {', '.join(TASKS)}")
    if name == "inpaint":
        if known is None:
            raise SignFastError("inpaint needs a mask")
        mask = KnownPixels(known)
        return Task(name, mask, mask, *TASKS[name])
    if name == "colorize":
        return Task(name, Luma(), Luma(), *TASKS[name])
    if name == "super-resolve":
        means = PatchMeans(factor)
        return Task(name, means, means, *TASKS[name])
    free: dict[str, Corruption] = {"denoise": AddedNoise(noise_std), "sketch": Edges(), "project": Blur()}
    return Task(name, free[name], None, *TASKS[name])


def centre_unknown(resolution: int) -> Tensor:
    """A mask (H, W) whose middle square of half the width is unknown: a quarter of the image."""
    known = torch.ones(resolution, resolution, dtype=torch.bool)
    quarter = resolution // 4
    known[quarter : resolution - quarter, quarter : resolution - quarter] = False
    return known

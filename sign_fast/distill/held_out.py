"""The images that SIGN's reconstruction is measured on, read and checked before a run begins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset, in_range, one_hot, open_dataset
from ..models.precond import Precond
from .settings import DistillSettings, check_images

MOST_IMAGES = 500
_DIGITS = (1, 8, 8)
_TEST_DIGITS = "digits:test"


@dataclass(frozen=True)
class HeldOut:
    """Images, spread over their data set.

    Args:
        images: (N, C, H, W) in [-1, 1], on the CPU.
        labels: (N, classes) one-hot rows, or None.
        trained_on: whether the student is trained on them: nothing else is at hand.
    """

    images: Tensor
    labels: Tensor | None
    trained_on: bool = False


def read_held_out(settings: DistillSettings, teacher: Precond, dataset: Dataset | None) -> HeldOut | None:
    """Up to 500 images of settings.held_out; else of the test digits where the student sees none of them; else the
    training data's.

    Without data the student sees no test digit, though its teacher may have been trained on them.

    Args:
        settings: of the run.
        teacher: of the run, for shape and classes.
        dataset: the run's real images, or None.

    Returns:
        None where nothing is measured (sid and sida), or where only the teacher's samples are left.

    Raises:
        SignFastError: they cannot be read, or do not fit the teacher.
    """
    s = settings
    if s.method != "sign":
        return None
    name = s.held_out
    if name is None and _is_of_digits(teacher) and s.data in (None, "digits:train"):
        name = _TEST_DIGITS
    if name is None:
        return None if dataset is None else HeldOut(*_read(dataset, teacher.label_dim), trained_on=True)
    source = open_dataset(name)
    check_images(name, source, s.teacher, teacher)
    return HeldOut(*_read(source, teacher.label_dim))


def measured_on(settings: DistillSettings, held_out: HeldOut | None) -> list[str]:
    """A line where SIGN's reconstruction is of images that the student is trained on."""
    if settings.method != "sign" or (held_out is not None and not held_out.trained_on):
        return []
    trained_on = settings.data or "the teacher's samples"
    return [f"reconstruction is measured on what the student is trained on, {trained_on}: name others with --held-out"]


def _is_of_digits(teacher: Precond) -> bool:
    shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    return shape == _DIGITS and teacher.label_dim in (0, 10)


def _read(source: Dataset, label_dim: int) -> tuple[Tensor, Tensor | None]:
    # spread over the whole: data sets may be sorted by class
    numbers = np.linspace(0, len(source) - 1, min(len(source), MOST_IMAGES)).round().astype(int)
    images = in_range(torch.from_numpy(np.stack([source.image(int(i)) for i in numbers])))
    return images, one_hot(torch.tensor([source.label(int(i)) for i in numbers]), label_dim)

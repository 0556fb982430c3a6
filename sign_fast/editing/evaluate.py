"""How near an edit comes to the truth, beside doing nothing and beside the teacher at equal cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import to_uint8
from ..sampling.engine import Engine
from ..sampling.requests import Labels, check_labels
from .controls import Solver, sdedit
from .projection import check_edit, engine_of, project
from .tasks import Task


@dataclass(frozen=True)
class Score:
    """PSNR of one method.

    Args:
        method: "student", "identity", "teacher, Euler" or "teacher, Heun".
        calls: network calls an image.
        noise_level: τ0; None for the identity.
        psnr: mean over the images, dB.
        standard_error: of that mean; None for one image.
    """

    method: str
    calls: int
    noise_level: float | None
    psnr: float
    standard_error: float | None


@dataclass(frozen=True)
class Evaluation:
    """Results of a task; images are (B, H, W, C) uint8 on the CPU.

    Args:
        task: its name.
        rounds: of the student, after its first network call.
        scores: the student's first.
        truth, observed: before and after the corruption.
        edited: by method, in the order of `scores`.
    """

    task: str
    rounds: int
    scores: tuple[Score, ...]
    truth: Tensor
    observed: Tensor
    edited: dict[str, Tensor]


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """10·log10(255²/MSE) of each image, dB.

    The squared error is taken as 1/12 at least, that of rounding to bytes, so that equal images give 58.9 dB.

    Args:
        images, truth: (B, H, W, C) uint8.

    Returns:
        (B,) float64.

    Raises:
        ValueError: other shapes or dtypes.
    """
    if images.shape != truth.shape or images.dtype != torch.uint8 or truth.dtype != torch.uint8:
        raise ValueError(
            f"PSNR is of uint8 images of one shape, not {images.dtype} {tuple(images.shape)} "
            f"and {truth.dtype} {tuple(truth.shape)}"
        )
    error = (images.double() - truth.double()).square().flatten(1).mean(1).clamp_min(1 / 12)
    return 10 * torch.log10(255**2 / error)


def evaluate(
    task: Task,
    truth: Tensor,
    *,
    student: Any,
    teacher: Any = None,
    noise_level: float | None = None,
    rounds: int | None = None,
    teacher_noise_level: float | None = None,
    labels: Labels = None,
    seeds: Iterable[int] | None = None,
    batch: int | None = None,
) -> Evaluation:
    """Corrupt clean images, edit them, and measure how near they come, beside both controls.

    Args:
        task: what is done.
        truth: clean images (B, C, H, W) in [-1, 1].
        student: as in `project`.
        teacher: as in `sdedit`; None leaves that control out. It makes as many calls as the student, by Euler's
            method, and by Heun's where the number is odd and above 1.
        noise_level, rounds, teacher_noise_level: None means the task's.
        labels, seeds: as in `project`; labels go to each network that has classes.
        batch: images at a time; None means all. It changes no noise.

    Raises:
        SignFastError: an argument is wrong.
    """
    task.corruption.check(truth.shape)
    student = engine_of(student)
    numbers, _ = check_edit(student, truth, seeds, labels if student.label_dim else None, task.constraint, "uint8")
    level = task.noise_level if noise_level is None else noise_level
    teacher_level = task.teacher_noise_level if teacher_noise_level is None else teacher_noise_level
    count = task.rounds if rounds is None else rounds
    observed = task.corruption.corrupt(truth, numbers)
    size = batch or len(truth)

    def edit(how: Callable[..., Tensor], engine: Engine, tau: float, **options: Any) -> Tensor:
        own = check_labels(labels, len(truth), engine.label_dim) if engine.label_dim else None
        options |= {"noise_level": tau, "constraint": task.constraint, "output": "uint8"}
        parts = []
        for part in (slice(start, start + size) for start in range(0, len(truth), size)):
            of_part = {"labels": None if own is None else own[part], "seeds": numbers[part]}
            parts.append(how(engine, observed[part], **of_part, **options).cpu())
        return torch.cat(parts)

    calls = count + 1
    methods: dict[str, tuple[int, float | None, Tensor]] = {
        "student": (calls, level, edit(project, student, level, rounds=count)),
        "identity": (0, None, to_uint8(observed)),
    }
    if teacher is not None:
        teacher = engine_of(teacher)
        solvers: dict[str, Solver] = {"teacher, Euler": "euler"}
        if calls > 1 and calls % 2:
            solvers["teacher, Heun"] = "heun"
        for name, solver in solvers.items():
            images = edit(sdedit, teacher, teacher_level, calls=calls, solver=solver)
            methods[name] = (calls, teacher_level, images)
    target = to_uint8(truth).cpu()
    edited = {name: images.cpu() for name, (_, _, images) in methods.items()}
    scores = tuple(_score(name, *facts[:2], psnr(edited[name], target)) for name, facts in methods.items())
    return Evaluation(task.name, count, scores, target, edited["identity"], edited)


def _score(method: str, calls: int, noise_level: float | None, values: Tensor) -> Score:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(method, calls, noise_level, float(values.mean()), error)

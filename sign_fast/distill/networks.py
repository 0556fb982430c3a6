"""Teacher, fake score, student and the student's average: how each begins."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.store import find, load_network, read_config
from ..errors import SignFastError
from ..models.idempotent import IdempotentPrecond, student_kwargs
from ..models.precond import Precond
from ..models.presets import CLASSES


@dataclass
class Networks:
    """What a distillation works with.

    Args:
        teacher: T, frozen, in eval mode.
        fake: F, the online score of the student's images.
        student: G (sid, sida) or f (sign).
        ema: the average of the student's weights, frozen, in eval mode.
        student_class, student_kwargs: what builds the student.
        frozen: sign's copy of the student, whose parameters get no gradient.
    """

    teacher: Precond
    fake: Precond
    student: Precond
    ema: Precond
    student_class: str
    student_kwargs: dict[str, Any]
    frozen: Precond | None = None


def load_teacher(name: str, device: torch.device) -> tuple[Precond, str, dict[str, Any]]:
    """A denoiser with its class name and arguments.

    Raises:
        SignFastError: no such network, or it takes no noise level and so cannot teach.
    """
    config = read_config(find(name))
    if config["cls"] == "IdempotentPrecond":
        raise SignFastError(f"{name} is a time-free student: a teacher is a denoiser such as the one it came from")
    if config.get("role") == "student":
        raise SignFastError(f"{name} is a student: name the denoiser that it was distilled from as --teacher")
    return load_network(name, device), config["cls"], config["kwargs"]


def build_networks(
    teacher: Precond,
    cls: str,
    kwargs: dict[str, Any],
    *,
    time_free: bool,
    dropout: float | None = None,
    student_sigma: float = 80,
) -> Networks:
    """Fake score and student as copies of the teacher (SiD), or the student as f(u) that starts as D((1+σ)u; σ).

    Args:
        teacher: on the device of the run; frozen here.
        cls, kwargs: its class name and arguments.
        time_free: whether the student is an `IdempotentPrecond`.
        dropout: of fake score and student; None keeps the teacher's.
        student_sigma: σ at which the time-free student's noise level is frozen.
    """
    teacher.eval().requires_grad_(False)
    trained = dict(kwargs) if dropout is None else {**kwargs, "dropout": dropout}
    fake = _copy(teacher, cls, trained)
    if time_free:
        start = IdempotentPrecond.from_teacher(teacher, student_sigma)
        cls, trained = "IdempotentPrecond", student_kwargs(teacher, start, trained)
        student = _copy(start, cls, trained)
    else:
        student = _copy(teacher, cls, trained)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    frozen = copy.deepcopy(ema) if time_free else None
    return Networks(teacher, fake, student, ema, cls, trained, frozen)


def _copy(net: Precond, cls: str, kwargs: dict[str, Any]) -> Precond:
    """A trainable network of that class and those arguments with net's weights, in its memory format."""
    with torch.device("meta"):
        new = CLASSES[cls](**kwargs)
    state = {
        name: value.detach().clone(memory_format=torch.preserve_format) for name, value in net.state_dict().items()
    }
    new.load_state_dict({name: state[name] for name in new.state_dict()}, assign=True)
    return new.train().requires_grad_(True)

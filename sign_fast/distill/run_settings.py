"""Settings that every distillation has, and their checks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import SignFastError
from ..training.schedule import LearningRateSchedule


@dataclass(frozen=True)
class RunSettings:
    """What all methods have in common; a method's own settings are a subclass, written to settings.json.

    Args:
        method: name of the method.
        teacher: folder or bundled name.
        data: real images, where the method takes some.
        steps: K of a few-step student; a network call is drawn from 1 … K each iteration (the uniform mixture).
        batch: images a step over all processes. accumulation: parts into which a process splits its share; the losses
            and gradients are those of the whole but for rounding and for dropout, whose masks are drawn by rank, part
            and order of the passes. SiDA takes a further student and teacher pass a part for its mean 1/ω.
        kimg: length of the run in thousands of images.
        lr, fake_lr: Adam's, of student and fake score. betas, fake_betas, eps: of Adam.
        lr_rampup_kimg, lr_schedule: see `training.schedule.learning_rate_factor`.
        ema_halflife_kimg, ema_rampup_ratio: see `training.ema.ema_beta`.
        fake_scale: factor ls of the fake score's loss.
        adversarial_weight, adversarial_kimg: lsg_gan, and when that term sets in.
        student_kimg: when the student starts to move, where there is such a term.
        fake_updates: of the fake score, for one of the student.
        precision: "fp32", "bf16" or "fp16" of the inner networks; weights stay fp32.
        parallel: of several processes: "ddp", or "fsdp" (FSDP2) for networks beyond one device.
        checkpointing: recompute every block's activations in the backward pass, for memory.
        seed: of every draw; what dropout draws depends on rank and accumulation too.
        log_every, save_every, quality_every: in iterations. keep: number of resumable states kept.
        stop_factor: stop where a figure is this many times worse than it should be.
        threads: that decode images.
    """

    method: str
    teacher: str
    data: str | None = None
    steps: int = 1
    batch: int = 256
    accumulation: int = 1
    kimg: float = 50_000
    lr: float = 1e-5
    fake_lr: float | None = None
    betas: tuple[float, float] = (0.0, 0.999)
    fake_betas: tuple[float, float] | None = None
    eps: float = 1e-8
    lr_rampup_kimg: float = 0
    lr_schedule: LearningRateSchedule = "constant"
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    fake_scale: float = 1
    adversarial_weight: float = 0.01
    adversarial_kimg: float = 200
    student_kimg: float = 100
    fake_updates: int = 1
    precision: str = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 100
    save_every: int = 1000
    keep: int = 2
    quality_every: int = 500
    stop_factor: float = 4
    threads: int = 2

    @property
    def iterations(self) -> int:
        """Steps of the whole run, the last one complete."""
        return -(-int(self.kimg * 1000) // self.batch)

    @property
    def combined(self) -> bool:
        """Whether one forward of each network serves both losses."""
        return False

    @property
    def trains_fake_score(self) -> bool:
        """Whether a term of the student reads the fake score."""
        return True

    @property
    def adversarial(self) -> bool:
        """Whether there is a term that sets in late, and before which the student may rest."""
        return False

    def reaches(self, kimg: float) -> bool:
        """Whether an iteration begins after so many thousand images."""
        return (self.iterations - 1) * self.batch >= kimg * 1000


# ---- checks ----

_POSITIVE = ("kimg", "lr", "fake_lr", "eps", "fake_scale")
_AT_LEAST_0 = (
    *("adversarial_weight", "adversarial_kimg", "student_kimg"),
    *("lr_rampup_kimg", "ema_halflife_kimg", "ema_rampup_ratio"),
)
_FROM_1 = (
    *("steps", "batch", "accumulation", "fake_updates", "keep", "threads"),
    *("log_every", "save_every", "quality_every"),
)
_CHOICES = {
    "lr_schedule": get_args(LearningRateSchedule),
    "precision": ("fp32", "bf16", "fp16"),
    "parallel": ("ddp", "fsdp"),
}
_LARGEST_ALPHA = 2.0
_MOST_STEPS = 625


def check_common(
    settings: RunSettings,
    choices: Mapping[str, Sequence[str]],
    positive: Sequence[str] = (),
    at_least_0: Sequence[str] = (),
    from_1: Sequence[str] = (),
) -> None:
    """What can be said of `RunSettings`, and of the fields named.

    Raises:
        SignFastError: naming the first that is out of range.
    """
    s = settings
    for name, allowed in {**choices, **_CHOICES}.items():
        if getattr(s, name) not in allowed:
            raise SignFastError(f"{name} must be {' or '.join(allowed)}, not {getattr(s, name)!r}")
    for name in (*_FROM_1, *from_1):
        if not getattr(s, name) >= 1:
            raise SignFastError(f"{name} must be at least 1, not {getattr(s, name)}")
    above_0 = (*_POSITIVE, *positive)
    for names, least in ((above_0, "above 0"), ((*_AT_LEAST_0, *at_least_0), "at least 0")):
        for name in names:
            value = getattr(s, name)
            if value is not None and not (math.isfinite(value) and (value > 0 if names is above_0 else value >= 0)):
                raise SignFastError(f"{name} must be a number {least}, not {value}")
    for name in ("betas", "fake_betas"):
        betas = getattr(s, name)
        if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise SignFastError(f"{name} must be two numbers in [0, 1), not {betas}")
    if not s.stop_factor > 1:
        raise SignFastError(f"stop_factor must be above 1 (inf: never stop), not {s.stop_factor}")
    if s.seed < 0:
        raise SignFastError(f"seed must be at least 0, not {s.seed}")
    if s.steps > _MOST_STEPS:
        raise SignFastError(f"steps must be at most {_MOST_STEPS}, not {s.steps}")
    if s.iterations < 1:
        raise SignFastError(f"a duration of {s.kimg:g} thousand images is less than one image: raise --duration")


def check_alpha(alpha: float) -> None:
    """That α is one.

    Raises:
        SignFastError: it is out of range.
    """
    if not -_LARGEST_ALPHA <= alpha <= _LARGEST_ALPHA:
        raise SignFastError(f"alpha must be between -{_LARGEST_ALPHA:g} and {_LARGEST_ALPHA:g}, not {alpha}")


def check_shares(settings: RunSettings, world: int) -> None:
    """That processes and parts get equal shares of a batch.

    Raises:
        SignFastError: they do not.
    """
    s = settings
    if s.batch % (world * s.accumulation):
        raise SignFastError(
            f"a batch of {s.batch} does not divide into {world} processes × {s.accumulation} parts: change --batch"
        )


def check_student_moves(settings: RunSettings) -> None:
    """That the run does not end before.

    Raises:
        SignFastError: it does.
    """
    s = settings
    if s.adversarial and not s.reaches(s.student_kimg):
        raise SignFastError(
            f"the run ends at {s.kimg:g} kimg, before the student starts to move at {s.student_kimg:g}: raise "
            "--duration, or lower --student-after"
        )


def common_remarks(settings: RunSettings, world: int) -> list[str]:
    """Lines on what a run of these settings does that one might not expect."""
    s = settings
    found = []
    if s.adversarial and not s.reaches(s.adversarial_kimg):
        found.append(
            f"the adversarial loss never sets in: it would at {s.adversarial_kimg:g} kimg, the run ends at {s.kimg:g}; "
            "lower --adversarial-after"
        )
    if s.parallel == "fsdp" and world == 1:
        found.append("--parallel fsdp does nothing in one process: start several with torchrun, or leave it away")
    return found


# ---- on disk ----


def plain(settings: RunSettings) -> dict[str, Any]:
    """As JSON holds them."""
    loaded: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return loaded


# settings that a resumed run may change: what it logs and keeps, and how the same numbers are computed
_ANYTIME = {"log_every", "save_every", "quality_every", "keep", "threads", "stop_factor", "held_out"}
_ANYTIME |= {"accumulation", "parallel", "checkpointing", "capture"}
_ANYTIME |= {"cache", "samples", "prompt_column", "accelerate"}  # prompts are compared themselves


def changed(before: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()) -> list[str]:
    """Names of the settings, as `plain` gives them, in which a run would not go on as it began.

    Args:
        before, now: settings.
        free: others that may differ: what is compared by its content, since a folder may have moved.
    """
    leave = {*_ANYTIME, *free}
    if now["lr_schedule"] == "constant":  # otherwise the length is in every step
        leave.add("kimg")
    return [name for name in now if name not in leave and now[name] != before.get(name)]

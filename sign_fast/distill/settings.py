"""The settings of a distillation, and their checks against teacher, data and number of processes."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..data import Dataset
from ..errors import SignFastError
from ..models.precond import Precond
from ..training.schedule import LearningRateSchedule
from .levels import share_left_out

Method = Literal["sid", "sida", "sign"]
Update = Literal["alternating", "combined"]


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a run, written to settings.json beside its results.

    Args:
        method: "sid", "sida" (SiD with real images) or "sign".
        teacher: folder or bundled name of a denoiser.
        data: 'digits', or a folder or zip of images; None where the method needs none.
        steps: K of few-step SiD; a network call is drawn from 1 … K each iteration (the uniform mixture).
        update: "alternating" as published, or "combined": one student and one fake-score forward serve both losses.
        batch: images a step over all processes. accumulation: parts into which a process splits its share; the losses
            and gradients are those of the whole but for rounding and for dropout, whose masks are drawn by rank, part
            and order of the passes. SiDA takes a further student and teacher pass a part for its mean 1/ω.
        kimg: length of the run in thousands of images.
        lr, fake_lr: Adam's, of student and fake score. betas, fake_betas, eps: of Adam.
        lr_rampup_kimg, lr_schedule: see `training.schedule.learning_rate_factor`.
        ema_halflife_kimg, ema_rampup_ratio: see `training.ema.ema_beta`.
        dropout: of student and fake score; None keeps the teacher's. Above 0 other processes or parts are another run
            of the same distribution.
        alpha, sigma_init, tmin, tmax: of SiD, see `SidMethod`.
        fake_scale, student_scale: factors ls and lsg of the losses.
        P_mean, P_std: of lnσ in the fake score's loss.
        adversarial_weight, adversarial_kimg, student_kimg: of SiDA: lsg_gan, when that term sets in, and when the
            student starts to move.
        rec, idem, flow, dmd, reg, den: SIGN's weights; 0 leaves a term away. matching: what the fourth term is.
            reg may be had with SiD and SiDA too.
        idem_ramp_kimg: over which idem rises from 0.
        fake_updates: of the fake score, for one of the student.
        flow_steps: N of the teacher's grid in the flow term. pairs: teacher pairs cached for the reg term.
        student_sigma: at which the time-free student's noise level is frozen.
        xflip: mirror half of the real images.
        precision: "fp32", "bf16" or "fp16" of the inner networks; weights stay fp32.
        parallel: of several processes: "ddp", or "fsdp" (FSDP2) for networks beyond one device.
        checkpointing: recompute every block's activations in the backward pass, for memory.
        capture: the whole iteration as one CUDA graph; None: on CUDA in one process.
        seed: of every draw; what dropout draws depends on rank and accumulation too.
        log_every, save_every, quality_every: in iterations. keep: number of resumable states kept.
        quality_images: of a quality check.
        held_out: images that SIGN's reconstruction is measured on, up to 500; None: the test digits where the data are
            "digits:train", or there are none and the teacher makes digits; elsewhere the training data, or the
            teacher's samples where there are none.
        stop_factor: stop where quality is this many times worse than its best.
        threads: that decode images.
    """

    method: Method
    teacher: str
    data: str | None = None
    steps: int = 1
    update: Update = "alternating"
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
    dropout: float | None = None
    alpha: float = 1.2
    sigma_init: float = 2.5
    tmin: float = 0
    tmax: float = 800
    fake_scale: float = 1
    student_scale: float = 100
    P_mean: float = -1.2
    P_std: float = 1.2
    adversarial_weight: float = 0.01
    adversarial_kimg: float = 200
    student_kimg: float = 100
    rec: float = 1
    idem: float = 1
    flow: float = 0.5
    dmd: float = 2
    reg: float = 0
    den: float = 1
    matching: Literal["dmd", "sid"] = "dmd"
    idem_ramp_kimg: float = 64
    fake_updates: int = 1
    flow_steps: int = 18
    pairs: int = 2000
    student_sigma: float = 80
    xflip: bool = False
    precision: str = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpointing: bool = False
    capture: bool | None = None
    seed: int = 0
    log_every: int = 100
    save_every: int = 1000
    keep: int = 2
    quality_every: int = 500
    quality_images: int = 500
    held_out: str | None = None
    stop_factor: float = 4
    threads: int = 2

    @property
    def iterations(self) -> int:
        """Steps of the whole run, the last one complete."""
        return -(-int(self.kimg * 1000) // self.batch)

    @property
    def trains_fake_score(self) -> bool:
        """Whether a term of the student reads the fake score."""
        return self.method != "sign" or self.dmd > 0

    @property
    def needs_pairs(self) -> bool:
        """Whether the teacher's samples are trained on: in place of data, or by the regression term."""
        return self.reg > 0 or (self.method == "sign" and self.data is None)

    def reaches(self, kimg: float) -> bool:
        """Whether an iteration begins after so many thousand images."""
        return (self.iterations - 1) * self.batch >= kimg * 1000


# ---- checks ----

_POSITIVE = ("kimg", "lr", "fake_lr", "eps", "sigma_init", "tmax", "fake_scale", "student_scale", "P_std")
_AT_LEAST_0 = (
    *("rec", "idem", "flow", "dmd", "reg", "den", "adversarial_weight", "adversarial_kimg", "student_kimg"),
    *("idem_ramp_kimg", "lr_rampup_kimg", "ema_halflife_kimg", "ema_rampup_ratio", "student_sigma"),
)
_FROM_1 = (
    *("steps", "batch", "accumulation", "fake_updates", "flow_steps", "keep", "threads"),
    *("log_every", "save_every", "quality_every"),
)
_SIGN_TERMS = ("rec", "idem", "flow", "dmd", "reg")
_LARGEST_ALPHA = 2.0
_LARGEST_TMAX = 1000
_MOST_STEPS = 625
_MOST_LEFT_OUT = 0.05  # of the fake score's noise levels


def check_settings(settings: DistillSettings) -> None:
    """What can be said of settings alone.

    Raises:
        SignFastError: naming the first that is out of range, or that does not go with another.
    """
    s = settings
    for name, choices in (
        ("method", get_args(Method)),
        ("update", get_args(Update)),
        ("matching", ("dmd", "sid")),
        ("lr_schedule", get_args(LearningRateSchedule)),
        ("precision", ("fp32", "bf16", "fp16")),
        ("parallel", ("ddp", "fsdp")),
    ):
        if getattr(s, name) not in choices:
            raise SignFastError(f"{name} must be {' or '.join(choices)}, not {getattr(s, name)!r}")
    for name in _FROM_1:
        if not getattr(s, name) >= 1:
            raise SignFastError(f"{name} must be at least 1, not {getattr(s, name)}")
    for names, least in ((_POSITIVE, "above 0"), (_AT_LEAST_0, "at least 0")):
        for name in names:
            value = getattr(s, name)
            if value is not None and not (math.isfinite(value) and (value > 0 if names is _POSITIVE else value >= 0)):
                raise SignFastError(f"{name} must be a number {least}, not {value}")
    if not -_LARGEST_ALPHA <= s.alpha <= _LARGEST_ALPHA:
        raise SignFastError(f"alpha must be between -{_LARGEST_ALPHA:g} and {_LARGEST_ALPHA:g}, not {s.alpha}")
    if not 0 <= s.tmin < s.tmax <= _LARGEST_TMAX:
        raise SignFastError(f"0 ≤ tmin < tmax ≤ {_LARGEST_TMAX} must hold, not tmin {s.tmin} and tmax {s.tmax}")
    if not math.isfinite(s.P_mean):
        raise SignFastError(f"P_mean must be a number, not {s.P_mean}")
    if s.dropout is not None and not 0 <= s.dropout < 1:
        raise SignFastError(f"dropout must be in [0, 1), not {s.dropout}")
    for name in ("betas", "fake_betas"):
        betas = getattr(s, name)
        if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise SignFastError(f"{name} must be two numbers in [0, 1), not {betas}")
    if not s.stop_factor > 1:
        raise SignFastError(f"stop_factor must be above 1 (inf: never stop), not {s.stop_factor}")
    if s.quality_images < 2 or s.pairs < 2:
        raise SignFastError("quality_images and pairs must be at least 2")
    if s.seed < 0:
        raise SignFastError(f"seed must be at least 0, not {s.seed}")
    if s.steps > _MOST_STEPS:
        raise SignFastError(f"steps must be at most {_MOST_STEPS}, not {s.steps}")
    if s.iterations < 1:
        raise SignFastError(f"a duration of {s.kimg:g} thousand images is less than one image: raise --duration")
    _check_method(s)


def _check_method(s: DistillSettings) -> None:
    if s.method == "sida" and s.data is None:
        raise SignFastError("sida trains with real images: name them with --data, or use --method sid instead")
    if s.method == "sida" and not s.reaches(s.student_kimg):
        raise SignFastError(
            f"the run ends at {s.kimg:g} kimg, before the student starts to move at {s.student_kimg:g}: raise "
            "--duration, or lower --student-after"
        )
    if s.update == "combined" and s.trains_fake_score and (share := share_left_out(s)) > _MOST_LEFT_OUT:
        widen = "" if s.method == "sign" else "bring --tmin and --tmax nearer to 0 and 1000, or "
        raise SignFastError(
            f"--update combined would leave out {share:.1%} of the fake score's noise levels, P_mean {s.P_mean:g} and "
            f"P_std {s.P_std:g}: {widen}use --update alternating"
        )
    if s.method != "sign":
        return
    if s.steps != 1:
        raise SignFastError("sign trains one map for any number of steps: leave --steps away")
    if not any(getattr(s, name) for name in _SIGN_TERMS):
        raise SignFastError(f"the weights of {', '.join(_SIGN_TERMS)} are all 0: there is nothing to train")
    if s.update == "combined" and s.matching == "sid":
        raise SignFastError("--update combined goes with --matching dmd: for --matching sid use --update alternating")


def check_fit(settings: DistillSettings, teacher: Precond, dataset: Dataset | None, world: int) -> None:
    """What depends on teacher, data and number of processes.

    Raises:
        SignFastError: they do not fit each other.
    """
    s = settings
    if s.batch % (world * s.accumulation):
        raise SignFastError(
            f"a batch of {s.batch} does not divide into {world} processes × {s.accumulation} parts: change --batch"
        )
    if dataset is not None:
        check_images(str(s.data), dataset, s.teacher, teacher)


def check_images(name: str, dataset: Dataset, teacher_name: str, teacher: Precond) -> None:
    """That images are of the teacher's shape and classes.

    Raises:
        SignFastError: they are not.
    """
    want = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    if dataset.shape != want:
        raise SignFastError(
            f"the images of {name} are {dataset.shape} (C, H, W), the teacher {teacher_name} makes {want}: use its data"
        )
    if teacher.label_dim and dataset.num_classes != teacher.label_dim:
        has = f"{dataset.num_classes} classes" if dataset.num_classes else "no labels"
        raise SignFastError(f"{name} has {has}, the teacher {teacher_name} {teacher.label_dim} classes: use its data")


def remarks(settings: DistillSettings, world: int) -> list[str]:
    """Lines on what a run of these settings does that one might not expect."""
    s = settings
    found = []
    if s.method == "sign" and s.data is None:
        found.append(f"no --data: sign trains on {s.pairs} samples of the teacher")
    if s.method == "sida" and not s.reaches(s.adversarial_kimg):
        found.append(
            f"the adversarial loss never sets in: it would at {s.adversarial_kimg:g} kimg, the run ends at {s.kimg:g}; "
            "lower --adversarial-after"
        )
    if s.parallel == "fsdp" and world == 1:
        found.append("--parallel fsdp does nothing in one process: start several with torchrun, or leave it away")
    return found


def plain(settings: DistillSettings) -> dict[str, Any]:
    """As JSON holds them."""
    loaded: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return loaded


# settings that a resumed run may change: what it logs and keeps, and how the same numbers are computed
_ANYTIME = {"log_every", "save_every", "quality_every", "keep", "threads", "stop_factor", "held_out"}
_ANYTIME |= {"accumulation", "parallel", "checkpointing", "capture"}
_BY_HASH = {"teacher"}  # compared by its weights: a folder may have moved


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings, as `plain` gives them, in which a run would not go on as it began."""
    free = _ANYTIME | _BY_HASH
    if now["lr_schedule"] == "constant":  # otherwise the length is in every step
        free = free | {"kimg"}
    return [name for name in now if name not in free and now[name] != before.get(name)]

"""The settings of SiD, SiDA and SIGN, and their checks against teacher, data and number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..data import Dataset
from ..errors import SignFastError
from ..models.precond import Precond
from .levels import share_left_out
from .run_settings import RunSettings, check_alpha, check_common, check_shares, check_student_moves, common_remarks

Method = Literal["sid", "sida", "sign"]
Update = Literal["alternating", "combined"]


@dataclass(frozen=True)
class DistillSettings(RunSettings):
    """Settings of a run of networks of `sign_fast.models`.

    Args:
        method: "sid", "sida" (SiD with real images) or "sign".
        teacher: folder or bundled name of a denoiser.
        data: 'digits', or a folder or zip of images; None where the method needs none.
        update: "alternating" as published, or "combined": one student and one fake-score forward serve both losses.
        dropout: of student and fake score; None keeps the teacher's. Above 0 other processes or parts are another run
            of the same distribution.
        alpha, sigma_init, tmin, tmax: of SiD, see `SidMethod`.
        student_scale: factor lsg of the student's loss.
        P_mean, P_std: of lnσ in the fake score's loss.
        rec, idem, flow, dmd, reg, den: SIGN's weights; 0 leaves a term away. matching: what the fourth term is.
            reg may be had with SiD and SiDA too.
        idem_ramp_kimg: over which idem rises from 0.
        flow_steps: N of the teacher's grid in the flow term. pairs: teacher pairs cached for the reg term.
        student_sigma: at which the time-free student's noise level is frozen.
        xflip: mirror half of the real images.
        capture: the whole iteration as one CUDA graph; None: on CUDA in one process.
        quality_images: of a quality check.
        held_out: images that SIGN's reconstruction is measured on, up to 500; None: the test digits where the data are
            "digits:train", or there are none and the teacher makes digits; elsewhere the training data, or the
            teacher's samples where there are none.
        stop_factor: stop where quality is this many times worse than its best.
    """

    method: Method
    update: Update = "alternating"
    dropout: float | None = None
    alpha: float = 1.2
    sigma_init: float = 2.5
    tmin: float = 0
    tmax: float = 800
    student_scale: float = 100
    P_mean: float = -1.2
    P_std: float = 1.2
    rec: float = 1
    idem: float = 1
    flow: float = 0.5
    dmd: float = 2
    reg: float = 0
    den: float = 1
    matching: Literal["dmd", "sid"] = "dmd"
    idem_ramp_kimg: float = 64
    flow_steps: int = 18
    pairs: int = 2000
    student_sigma: float = 80
    xflip: bool = False
    capture: bool | None = None
    quality_images: int = 500
    held_out: str | None = None

    @property
    def combined(self) -> bool:
        return self.update == "combined"

    @property
    def trains_fake_score(self) -> bool:
        """Whether a term of the student reads the fake score."""
        return self.method != "sign" or self.dmd > 0

    @property
    def adversarial(self) -> bool:
        return self.method == "sida"

    @property
    def needs_pairs(self) -> bool:
        """Whether the teacher's samples are trained on: in place of data, or by the regression term."""
        return self.reg > 0 or (self.method == "sign" and self.data is None)


# ---- checks ----

_POSITIVE = ("sigma_init", "tmax", "student_scale", "P_std")
_AT_LEAST_0 = ("rec", "idem", "flow", "dmd", "reg", "den", "idem_ramp_kimg", "student_sigma")
_SIGN_TERMS = ("rec", "idem", "flow", "dmd", "reg")
_LARGEST_TMAX = 1000
_MOST_LEFT_OUT = 0.05  # of the fake score's noise levels


def check_settings(settings: DistillSettings) -> None:
    """What can be said of settings alone.

    Raises:
        SignFastError: naming the first that is out of range, or that does not go with another.
    """
    s = settings
    choices = {"method": get_args(Method), "update": get_args(Update), "matching": ("dmd", "sid")}
    check_common(s, choices, _POSITIVE, _AT_LEAST_0, ("flow_steps",))
    check_alpha(s.alpha)
    if not 0 <= s.tmin < s.tmax <= _LARGEST_TMAX:
        raise SignFastError(f"0 ≤ tmin < tmax ≤ {_LARGEST_TMAX} must hold, not tmin {s.tmin} and tmax {s.tmax}")
    if not math.isfinite(s.P_mean):
        raise SignFastError(f"P_mean must be a number, not {s.P_mean}")
    if s.dropout is not None and not 0 <= s.dropout < 1:
        raise SignFastError(f"dropout must be in [0, 1), not {s.dropout}")
    if s.quality_images < 2 or s.pairs < 2:
        raise SignFastError("quality_images and pairs must be at least 2")
    _check_method(s)


def _check_method(s: DistillSettings) -> None:
    if s.method == "sida" and s.data is None:
        raise SignFastError("sida trains with real images: name them with --data, or use --method sid instead")
    check_student_moves(s)
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
    check_shares(settings, world)
    if dataset is not None:
        check_images(str(settings.data), dataset, settings.teacher, teacher)


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
    return found + common_remarks(s, world)

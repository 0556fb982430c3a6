"""Noise levels that student and fake score are trained at, and their densities, all of lnσ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sampling.students import few_step_sigmas

if TYPE_CHECKING:
    from .settings import DistillSettings

RHO, GRID_MIN, GRID_MAX = 7, 0.002, 80.0  # of the levels of SiD's student
T_MIN, T_MAX = 0.02, 0.98  # of the levels at which SIGN matches distributions, σ = t/(1−t)


def student_sigma(uniform: Tensor, tmax: float, tmin: float = 0) -> Tensor:
    """σ = (σmax^{1/7} + (1−t)(σmin^{1/7} − σmax^{1/7}))^7, σ from 0.002 to 80, t ~ U(tmin, tmax)/1000 (SiD, eq. 24)."""
    t = (tmin + uniform * (tmax - tmin)) / 1000
    low, high = GRID_MIN ** (1 / RHO), GRID_MAX ** (1 / RHO)
    return (high + (1 - t) * (low - high)) ** RHO


def student_density(sigma: Tensor, tmax: float, tmin: float = 0) -> Tensor:
    """Density of lnσ of `student_sigma`: t is linear in σ^{1/7}, so dt/dlnσ = σ^{1/7}/7/(σmax^{1/7} − σmin^{1/7})."""
    span = (GRID_MAX ** (1 / RHO) - GRID_MIN ** (1 / RHO)) * (tmax - tmin) / 1000
    return sigma ** (1 / RHO) / (RHO * span)


def fake_sigma(normal: Tensor, mean: float, std: float) -> Tensor:
    """σ with lnσ ~ N(mean, std²) (EDM)."""
    return (normal * std + mean).exp()


def fake_density(sigma: Tensor, settings: DistillSettings) -> Tensor:
    """Density of lnσ where the fake score's loss draws σ."""
    z = (sigma.log() - settings.P_mean) / settings.P_std
    return (-0.5 * z**2).exp() / (settings.P_std * math.sqrt(2 * math.pi))


def call_levels(settings: DistillSettings) -> tuple[float, ...]:
    """σ_1 … σ_K of a few-step student's calls, σ_1 = σ_init (SiD few-step)."""
    return (settings.sigma_init, *few_step_sigmas(settings.steps, settings.sigma_init)[1:])


def level_ratio(sigma: Tensor, settings: DistillSettings) -> Tensor:
    """Density of the fake score's levels over SiD's student's, at the student's: at most about 3.3 by default.

    The combined update draws σ as the student's loss wants it and weighs the fake score's loss with this, so that its
    expectation stays the published one but for the levels that the student never has, see `share_left_out`.
    """
    return fake_density(sigma, settings) / student_density(sigma, settings.tmax, settings.tmin)


def share_left_out(settings: DistillSettings) -> float:
    """Share of the fake score's levels, lnσ ~ N(P_mean, P_std²), that the student's loss never draws.

    Of SiD's they are those outside of σ(tmin) … σ(tmax), 1.4e-4 by default; of SIGN's those outside of 0.0204 … 49,
    1.2 % by default.
    """
    s = settings
    if s.method == "sign":
        ends = torch.tensor([T_MIN / (1 - T_MIN), T_MAX / (1 - T_MAX)], dtype=torch.float64)
    else:
        ends = student_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), s.tmax, s.tmin)
    low, high = torch.special.ndtr((ends.log() - s.P_mean) / s.P_std).tolist()
    return float(1 - (high - low))

"""EDM's general sampler over solvers, discretisations, schedules and scalings (Karras et al. 2022, Table 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.precond import iddpm_noise_levels
from .edm import check_steps, churn, karras_sigmas
from .loop import at_levels, draw_ahead, run_plan
from .plan import Call, Combine, Levels, Plan, Step, terms


@dataclass(frozen=True)
class Schedule:
    """σ(t), its derivative and its inverse, on Python floats (the samplers' scalars stay off the device)."""

    sigma: Callable[[float], float]
    derivative: Callable[[float], float]
    inverse: Callable[[float], float]


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """σ(t) = √(exp(½β_d t² + β_min t) − 1)."""

    def sigma(t: float) -> float:
        return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def derivative(t: float) -> float:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    def inverse(s: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s**2)) - beta_min) / beta_d

    return Schedule(sigma, derivative, inverse)


def ve_schedule() -> Schedule:
    """σ(t) = √t."""
    return Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda s: s**2)


def linear_schedule() -> Schedule:
    """σ(t) = t."""
    return Schedule(lambda t: t, lambda t: 1.0, lambda s: s)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def discretize(
    discretization: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    vp: Schedule,
    epsilon_s: float,
    C_1: float,
    C_2: float,
    M: int,
) -> list[float]:
    """The N noise levels from high to low (EDM, Table 1, "Time steps")."""
    last = max(num_steps - 1, 1)
    if discretization == "vp":
        return [vp.sigma(1 + i / last * (epsilon_s - 1)) for i in range(num_steps)]
    if discretization == "ve":
        return [sigma_max * (sigma_min / sigma_max) ** (i / last) for i in range(num_steps)]
    if discretization == "iddpm":
        levels = [u for u in iddpm_noise_levels(M, C_1, C_2) if sigma_min <= u <= sigma_max]
        return [levels[round((len(levels) - 1) / last * i)] for i in range(num_steps)]
    return karras_sigmas(num_steps, sigma_min, sigma_max, rho).tolist()


def ablation_plan(
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: Literal["heun", "euler"] = "heun",
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm",
    schedule: Literal["vp", "ve", "linear"] = "linear",
    scaling: Literal["vp", "none"] = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    *,
    round_sigma: Callable[[Tensor], Tensor] = torch.as_tensor,
    net_sigma_min: float = 0.0,
    net_sigma_max: float = float("inf"),
) -> Plan:
    """`ablation_sampler` as a plan in float64, with one draw a step where S_churn > 0.

    The states are z = x/s(t), which is what the network sees, so that scaling costs nothing but coefficients.

    Args:
        round_sigma, net_sigma_min, net_sigma_max: the network's.
        others: as in `ablation_sampler`.

    Raises:
        ValueError: num_steps < 1, an unknown choice, or a lowest noise level above the highest.
    """
    check_steps(num_steps)
    _one_of("solver", solver, ("heun", "euler"))
    _one_of("discretization", discretization, ("vp", "ve", "iddpm", "edm"))
    _one_of("schedule", schedule, ("vp", "ve", "linear"))
    _one_of("scaling", scaling, ("vp", "none"))

    original = vp_schedule(19.9, 0.1)
    lowest = {"vp": original.sigma(epsilon_s), "ve": 0.02, "iddpm": 0.002, "edm": 0.002}
    highest = {"vp": original.sigma(1), "ve": 100.0, "iddpm": 81.0, "edm": 80.0}
    sigma_min = max(lowest[discretization] if sigma_min is None else sigma_min, net_sigma_min)
    sigma_max = min(highest[discretization] if sigma_max is None else sigma_max, net_sigma_max)

    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min {sigma_min} is above sigma_max {sigma_max}")

    # the β with σ(epsilon_s) = sigma_min and σ(1) = sigma_max
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    vp = vp_schedule(beta_d, high - 0.5 * beta_d)
    chosen = {"vp": vp, "ve": ve_schedule(), "linear": linear_schedule()}[schedule]
    scaled = scaling == "vp"

    def s(t: float) -> float:
        return 1 / math.sqrt(1 + chosen.sigma(t) ** 2) if scaled else 1.0

    def s_derivative(t: float) -> float:
        return -chosen.sigma(t) * chosen.derivative(t) * s(t) ** 3 if scaled else 0.0

    def times(sigmas: list[float]) -> list[float]:
        return [chosen.inverse(sigma) for sigma in round_sigma(torch.tensor(sigmas, dtype=torch.float64)).tolist()]

    sigmas = discretize(discretization, num_steps, sigma_min, sigma_max, rho, vp, epsilon_s, C_1, C_2, M)
    t = [*times(sigmas), 0.0]
    reached = [chosen.sigma(u) for u in t[:-1]]
    t_hat = times([sigma * (1 + churn(sigma, num_steps, S_churn, S_min, S_max)) for sigma in reached])

    def slope(u: float) -> tuple[float, float]:
        """(a, b) with dx/dt = s·(a·z − b·D(z; σ)) at time u (EDM, Algorithm 1, line 4)."""
        rate = chosen.derivative(u) / chosen.sigma(u)
        return rate + s_derivative(u) / s(u), rate

    def noise(i: int) -> tuple[tuple[int, float], ...]:
        if S_churn <= 0 or i == num_steps:
            return ()
        added = math.sqrt(max(chosen.sigma(t_hat[i]) ** 2 - chosen.sigma(t[i]) ** 2, 0.0))
        return terms((i + 1, added * S_noise))

    levels = Levels()
    z, denoised, z_prime, denoised_prime = range(4)
    steps: list[Step] = [Combine(z, (), ((0, chosen.sigma(t[0])), *noise(0)))]
    for i, (u, v) in enumerate(zip(t_hat, t[1:], strict=True)):
        h = v - u
        a, b = slope(u)
        to_next = s(u) / s(v)
        steps.append(Call(denoised, z, levels.number(chosen.sigma(u))))
        if solver == "euler" or i == num_steps - 1:
            euler = terms((z, to_next * (1 + h * a)), (denoised, -to_next * h * b))
            steps.append(Combine(z, euler, noise(i + 1)))
            continue
        p = u + alpha * h
        a_prime, b_prime = slope(p)
        to_prime, from_prime = s(u) / s(p), s(p) / s(v)
        second = 1 / (2 * alpha)
        first = 1 - second
        predictor = terms((z, to_prime * (1 + alpha * h * a)), (denoised, -to_prime * alpha * h * b))
        corrector = terms(
            (z, to_next * (1 + h * first * a)),
            (denoised, -to_next * h * first * b),
            (z_prime, from_prime * h * second * a_prime),
            (denoised_prime, -from_prime * h * second * b_prime),
        )
        steps.append(Combine(z_prime, predictor))
        steps.append(Call(denoised_prime, z_prime, levels.number(chosen.sigma(p))))
        steps.append(Combine(z, corrector, noise(i + 1)))
    draws = num_steps + 1 if S_churn > 0 else 1
    return Plan(tuple(steps), levels.values(), draws, registers=4, result=z)


@torch.no_grad()
def ablation_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: Literal["heun", "euler"] = "heun",
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm",
    schedule: Literal["vp", "ve", "linear"] = "linear",
    scaling: Literal["vp", "none"] = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """The paper's Algorithm 1 with the second-order α form (EDM, eq. 4 and Table 1), in float64.

    Args:
        net, latents, class_labels, randn_like, num_steps: as in `edm_sampler`.
        sigma_min, sigma_max: None takes the discretisation's own; the range is narrowed to the network's.
        rho: of the "edm" discretisation.
        solver: "heun" (second order, with alpha) or "euler".
        discretization: of the time steps. schedule: σ(t). scaling: s(t), "vp" is 1/√(1 + σ²).
        epsilon_s: smallest t of "vp". C_1, C_2, M: of "iddpm".
        alpha: where the second evaluation lies; 1 is Heun's, ½ the midpoint method.
        S_churn, S_min, S_max, S_noise: as in `edm_sampler`.

    Returns:
        (B, C, H, W) float64.

    Raises:
        ValueError: num_steps < 1, an unknown choice, or a lowest noise level above the highest.
    """
    plan = ablation_plan(
        num_steps,
        sigma_min,
        sigma_max,
        rho,
        solver,
        discretization,
        schedule,
        scaling,
        epsilon_s,
        C_1,
        C_2,
        M,
        alpha,
        S_churn,
        S_min,
        S_max,
        S_noise,
        round_sigma=net.round_sigma,
        net_sigma_min=net.sigma_min,
        net_sigma_max=net.sigma_max,
    )
    return run_plan(plan, at_levels(net, plan, class_labels, latents.device), draw_ahead(plan, latents, randn_like))

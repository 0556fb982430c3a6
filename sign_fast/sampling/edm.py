"""EDM's stochastic sampler (Karras et al. 2022, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .loop import at_levels, draw_ahead, run_plan
from .plan import Call, Combine, Levels, Plan, Step, terms


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """σ_i = (σmax^{1/ρ} + i/(N−1)·(σmin^{1/ρ} − σmax^{1/ρ}))^ρ, i = 0 … N−1 (EDM, eq. 5).

    Args:
        num_steps: N ≥ 1; N = 1 gives σmax.
        sigma_min, sigma_max, rho: of the formula.

    Returns:
        (N,) float64 on the CPU.
    """
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top + ramp * (bottom - top)) ** rho


def check_steps(num_steps: int) -> None:
    """Raise ValueError unless num_steps is at least 1."""
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {num_steps}")


def churn(sigma: float, num_steps: int, S_churn: float, S_min: float, S_max: float) -> float:
    """γ: how much noise is added back at `sigma`, relative to it (EDM, Algorithm 2, line 4)."""
    return min(S_churn / num_steps, 2**0.5 - 1) if S_min <= sigma <= S_max else 0.0


def edm_plan(
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    *,
    round_sigma: Callable[[Tensor], Tensor] = torch.as_tensor,
    net_sigma_min: float = 0.0,
    net_sigma_max: float = float("inf"),
) -> Plan:
    """`edm_sampler` as a plan in float64, with one draw a step where S_churn > 0.

    Args:
        num_steps, sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise: as in `edm_sampler`.
        round_sigma, net_sigma_min, net_sigma_max: the network's.

    Raises:
        ValueError: num_steps < 1, a lowest noise level that is not positive, or one above the highest.
    """
    check_steps(num_steps)
    lowest, highest = max(sigma_min, net_sigma_min), min(sigma_max, net_sigma_max)
    if not lowest > 0:
        raise ValueError(f"sigma_min must be positive, not {lowest}")
    if lowest > highest:
        raise ValueError(f"sigma_min {lowest} is above sigma_max {highest}")
    sigmas = karras_sigmas(num_steps, lowest, highest, rho)
    sigmas = round_sigma(sigmas).to(sigmas)
    t: list[float] = sigmas.tolist()
    gammas = [churn(sigma, num_steps, S_churn, S_min, S_max) for sigma in t]
    t_hat = round_sigma(sigmas * (1 + torch.tensor(gammas, dtype=torch.float64))).tolist()
    return _heun((*t, 0.0), tuple(t_hat), S_noise if S_churn > 0 else None)


@lru_cache(maxsize=128)
def _heun(t: tuple[float, ...], t_hat: tuple[float, ...], S_noise: float | None) -> Plan:
    """Heun's steps from t_hat[i] to t[i + 1]; S_noise None draws no noise.

    With ρ = t_{i+1}/t̂_i, the predictor (Algorithm 2, lines 7 and 8) is x' = ρ·x + (1 − ρ)·D, and the corrector (lines
    10 and 11) is x' + κ·(D' − D) with κ = ½(1/ρ − 1).
    """
    num_steps = len(t_hat)
    levels = Levels()
    x, denoised, corrected = range(3)

    def noise(step: int) -> tuple[tuple[int, float], ...]:
        if S_noise is None or step == num_steps:
            return ()
        return terms((step + 1, math.sqrt(max(t_hat[step] ** 2 - t[step] ** 2, 0.0)) * S_noise))

    steps: list[Step] = [Combine(x, (), ((0, t[0]), *noise(0)))]
    for i in range(num_steps):
        ratio = t[i + 1] / t_hat[i]
        steps.append(Call(denoised, x, levels.number(t_hat[i])))
        steps.append(Combine(x, terms((x, ratio), (denoised, 1 - ratio))))
        if i < num_steps - 1:
            half = 0.5 * (1 / ratio - 1)
            steps.append(Call(corrected, x, levels.number(t[i + 1])))
            steps.append(Combine(x, terms((x, 1.0), (corrected, half), (denoised, -half)), noise(i + 1)))
    draws = 1 if S_noise is None else num_steps + 1
    return Plan(tuple(steps), levels.values(), draws, registers=3, result=x)


@torch.no_grad()
def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """Heun's second-order method with optional churn; 2·num_steps − 1 network calls.

    Args:
        net: denoiser net(x, sigma, class_labels) with sigma_min, sigma_max and round_sigma, as in `sign_fast.models`.
        latents: (B, C, H, W) standard normal; class_labels (B, label_dim) or None.
        randn_like: draws the churn's noise, once a step where S_churn > 0, all before the first network call.
        num_steps: N.
        sigma_min, sigma_max, rho: of the schedule; the range is narrowed to the network's.
        S_churn, S_min, S_max, S_noise: of the churn.

    Returns:
        (B, C, H, W) float64.

    Raises:
        ValueError: num_steps < 1, a lowest noise level that is not positive, or one above the highest.
    """
    plan = edm_plan(
        num_steps,
        sigma_min,
        sigma_max,
        rho,
        S_churn,
        S_min,
        S_max,
        S_noise,
        round_sigma=net.round_sigma,
        net_sigma_min=net.sigma_min,
        net_sigma_max=net.sigma_max,
    )
    return run_plan(plan, at_levels(net, plan, class_labels, latents.device), draw_ahead(plan, latents, randn_like))

"""EDM's stochastic sampler (Karras et al. 2022, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        randn_like: draws the churn's noise, once a step where S_churn > 0.
        num_steps: N.
        sigma_min, sigma_max, rho: of the schedule; the range is narrowed to the network's.
        S_churn, S_min, S_max, S_noise: of the churn.

    Returns:
        (B, C, H, W) float64.

    Raises:
        ValueError: num_steps < 1.
    """
    check_steps(num_steps)
    sigmas = karras_sigmas(num_steps, max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max), rho)
    sigmas = torch.cat([net.round_sigma(sigmas).to(sigmas), sigmas.new_zeros(1)])
    gammas = [churn(float(s), num_steps, S_churn, S_min, S_max) for s in sigmas[:-1]]
    raised = net.round_sigma(sigmas[:-1] * (1 + torch.tensor(gammas, dtype=torch.float64))).to(sigmas)
    t, t_hat = sigmas.to(latents.device), raised.to(latents.device)

    x = latents.to(torch.float64) * t[0]
    for i in range(num_steps):
        if S_churn > 0:
            x = x + (t_hat[i] ** 2 - t[i] ** 2).clip(min=0).sqrt() * S_noise * randn_like(x)
        d = (x - net(x, t_hat[i], class_labels).to(torch.float64)) / t_hat[i]
        step = t[i + 1] - t_hat[i]
        x_next = x + step * d
        if i < num_steps - 1:
            d_next = (x_next - net(x_next, t[i + 1], class_labels).to(torch.float64)) / t[i + 1]
            x_next = x + step * (0.5 * d + 0.5 * d_next)
        x = x_next
    return x

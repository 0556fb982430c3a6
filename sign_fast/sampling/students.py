"""Samplers of distilled students: one step, few steps, and the recursive and multi-step samplers of SIGN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .. import functional
from .edm import check_steps

SIGMA_INIT = 2.5
"""Noise level of a one-step student's input (SiD)."""
T_INIT = 625
"""The same level on the 1000-step "scaled_linear" schedule of latent models."""

RandnLike = Callable[[Tensor], Tensor]


@lru_cache(maxsize=1)
def alpha_bars() -> tuple[float, ...]:
    """ᾱ_t, t = 0 … 999, of the DDPM "scaled_linear" schedule with β from 0.00085 to 0.012, float32 as published."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return tuple((1 - betas).cumprod(0).tolist())


def few_step_grid(num_steps: int) -> list[int]:
    """t_i = trunc(625·(1 − i/K)), i = 0 … K−1 (few-step SiD).

    Raises:
        ValueError: num_steps < 1.
    """
    check_steps(num_steps)
    return [T_INIT * (num_steps - i) // num_steps for i in range(num_steps)]


def few_step_sigmas(num_steps: int, sigma_init: float = SIGMA_INIT) -> list[float]:
    """The few-step grid as noise levels √((1 − ᾱ)/ᾱ), scaled so that it starts at sigma_init exactly."""
    bars = [alpha_bars()[t] for t in few_step_grid(num_steps)]
    sigmas = [((1 - a) / a) ** 0.5 for a in bars]
    return [sigma_init * sigma / sigmas[0] for sigma in sigmas]


@torch.no_grad()
def one_step(net: Any, latents: Tensor, class_labels: Tensor | None = None, sigma: float = SIGMA_INIT) -> Tensor:
    """x = G(σ·z; σ) (SiD).

    Args:
        net: student net(x, sigma, class_labels).
        latents: (B, C, H, W) standard normal; class_labels (B, label_dim) or None.
        sigma: σ_init.

    Returns:
        (B, C, H, W) in the network's output dtype.
    """
    level = torch.full([1], sigma, dtype=torch.float64, device=latents.device)[0]
    images: Tensor = net(latents.to(torch.float64) * sigma, level, class_labels)
    return images


@torch.no_grad()
def few_step(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 4,
    sigma: float = SIGMA_INIT,
) -> Tensor:
    """D ← G(D + σ_i·n; σ_i) over `few_step_sigmas`, D = 0 at first and n the latents, fresh noise after.

    Args:
        net, latents, class_labels, sigma: as in `one_step`.
        randn_like: draws the noise of steps 2 … num_steps.
        num_steps: K network calls; 1 is `one_step`.

    Returns:
        (B, C, H, W) in the network's output dtype.

    Raises:
        ValueError: num_steps < 1.
    """
    levels = few_step_sigmas(num_steps, sigma)
    images = one_step(net, latents, class_labels, sigma)
    rest = torch.tensor(levels, dtype=torch.float64).to(latents.device)
    for i in range(1, num_steps):
        x = functional.renoise(images.to(torch.float64), randn_like(latents), 1.0, levels[i])
        images = net(x, rest[i], class_labels)
    return images


@torch.no_grad()
def few_step_latent(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 4,
    prediction: Literal["epsilon", "flow"] = "epsilon",
    noise: Literal["fresh", "fixed", "ddim"] = "fresh",
) -> Tensor:
    """Few-step generation with a noise-predicting or rectified-flow network (few-step SiD, Algorithm 1).

    "epsilon": x = √ᾱ·D + √(1−ᾱ)·n, D = (x − √(1−ᾱ)·ε(x, t))/√ᾱ at t_i = trunc(625(1 − i/K)).
    "flow": x = (1−t)·D + t·n, D = x − t·v(x, t) at t_i = (1 − i/K)·999/999.

    Args:
        predict: predict(x, t) with t (B,), int64 steps for "epsilon", floats in (0, 1] for "flow".
        latents: (B, C, H, W) standard normal, the first noise.
        randn_like: draws fresh noise.
        num_steps: K.
        prediction: what `predict` returns.
        noise: of the steps after the first: "fresh", "fixed" (the latents again) or "ddim" (the noise that the last
            step implies).

    Returns:
        (B, C, H, W), the D of the last step.

    Raises:
        ValueError: num_steps < 1, or an unknown choice.
    """
    if prediction not in ("epsilon", "flow"):
        raise ValueError(f"prediction must be epsilon or flow, not {prediction!r}")
    if noise not in ("fresh", "fixed", "ddim"):
        raise ValueError(f"noise must be fresh, fixed or ddim, not {noise!r}")
    batch = latents.shape[0]
    grid = few_step_grid(num_steps)
    denoised = torch.zeros_like(latents)
    n = latents
    for i in range(num_steps):
        if prediction == "epsilon":
            signal, spread = alpha_bars()[grid[i]] ** 0.5, (1 - alpha_bars()[grid[i]]) ** 0.5
            t = torch.full([batch], grid[i], dtype=torch.int64, device=latents.device)
        else:
            spread = 1 - i / num_steps
            signal = 1 - spread
            t = torch.full([batch], spread, dtype=latents.dtype, device=latents.device)
        if i and noise == "fresh":
            n = randn_like(latents)
        x = functional.renoise(denoised, n, signal, spread)
        output = predict(x, t)
        denoised = (x - spread * output) / signal if prediction == "epsilon" else x - spread * output
        if noise == "ddim":
            n = (x - signal * denoised) / spread
    return denoised


@torch.no_grad()
def recursive(student: Callable[[Tensor], Tensor], latents: Tensor, num_steps: int = 1) -> Tensor:
    """x ← f(x), num_steps times, from the latents (SIGN).

    Args:
        student: f, (B, C, H, W) -> (B, C, H, W), without a time input.
        latents: (B, C, H, W) standard normal.
        num_steps: k.

    Raises:
        ValueError: num_steps < 1.
    """
    check_steps(num_steps)
    x = latents
    for _ in range(num_steps):
        x = student(x)
    return x


@torch.no_grad()
def multistep(
    student: Callable[[Tensor], Tensor],
    latents: Tensor,
    noise_levels: Sequence[float],
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """x ← f(z), then x ← f((1 − τ_i)·x + τ_i·ε_i) for each τ_i (SIGN).

    Args:
        student, latents: as in `recursive`.
        noise_levels: τ_i in [0, 1].
        randn_like: draws ε_i.

    Raises:
        ValueError: a τ outside [0, 1].
    """
    if any(not 0 <= tau <= 1 for tau in noise_levels):
        raise ValueError(f"noise levels must lie in [0, 1], not {list(noise_levels)}")
    x = student(latents)
    for tau in noise_levels:
        x = student(functional.renoise(x, randn_like(x), 1 - tau, tau))
    return x

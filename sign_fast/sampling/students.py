"""Samplers of distilled students: one step, few steps, and the recursive and multi-step samplers of SIGN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .edm import check_steps
from .loop import at_levels, draw_ahead, run_plan
from .plan import Call, Combine, Plan, Step, terms

SIGMA_INIT = 2.5
"""Noise level of a one-step student's input (SiD)."""
T_INIT = 625
"""The same level on the 1000-step "scaled_linear" schedule of latent models."""

RandnLike = Callable[[Tensor], Tensor]
LatentPrediction: TypeAlias = Literal["epsilon", "v", "flow"]
"""What a network of latents predicts: the noise, √ᾱ·n − √(1−ᾱ)·x0, or n − x0."""
StepNoise: TypeAlias = Literal["fresh", "fixed", "ddim"]
"""The noise of the steps after the first: drawn afresh, the latents again, or what the last step implies."""


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


def one_step_plan(sigma: float = SIGMA_INIT) -> Plan:
    """`one_step` as a plan: float64 input, the network's output as it is."""
    return few_step_plan(1, sigma)


@lru_cache(maxsize=128)
def few_step_plan(num_steps: int = 4, sigma: float = SIGMA_INIT, noise_dtype: torch.dtype = torch.float32) -> Plan:
    """`few_step` as a plan: float64 inputs, noise_dtype draws, the network's last output as it is.

    Raises:
        ValueError: num_steps < 1.
    """
    levels = (sigma, *few_step_sigmas(num_steps, sigma)[1:])
    steps: list[Step] = [Combine(0, (), ((0, sigma),)), Call(0, 0, 0)]
    for i in range(1, num_steps):
        steps += [Combine(0, ((0, 1.0),), ((i, levels[i]),)), Call(0, 0, i)]
    return Plan(tuple(steps), levels, num_steps, registers=1, result=0, noise_dtype=noise_dtype)


@lru_cache(maxsize=128)
def few_step_latent_plan(
    num_steps: int = 4,
    prediction: LatentPrediction = "epsilon",
    noise: StepNoise = "fresh",
    dtype: torch.dtype = torch.float32,
    bars: tuple[float, ...] | None = None,
) -> Plan:
    """`few_step_latent` as a plan in the latents' dtype; the levels are the t_i.

    With x = a·D + s·n and D = p·x − q·output, the next state is a'·D + s'·n', where "ddim" has n' = (x − a·D)/s: the
    output itself for "epsilon", s·x + a·output for "v", x + a·output for "flow".

    Raises:
        ValueError: num_steps < 1, an unknown choice, or a schedule without 1000 numbers of which those of the grid lie
            between 0 and 1.
    """
    if prediction not in ("epsilon", "v", "flow"):
        raise ValueError(f"prediction must be epsilon, v or flow, not {prediction!r}")
    if noise not in ("fresh", "fixed", "ddim"):
        raise ValueError(f"noise must be fresh, fixed or ddim, not {noise!r}")
    grid = few_step_grid(num_steps)
    if prediction == "flow":
        levels = tuple(1 - i / num_steps for i in range(num_steps))
        signals, spreads = [1 - t for t in levels], list(levels)
    else:
        bars = alpha_bars() if bars is None else bars
        if len(bars) != 1000 or not all(0 < bars[t] < 1 for t in grid):
            raise ValueError("the schedule must have 1000 numbers, those of the grid between 0 and 1")
        levels = tuple(float(t) for t in grid)
        signals = [bars[t] ** 0.5 for t in grid]
        spreads = [(1 - bars[t]) ** 0.5 for t in grid]

    x, output = range(2)
    steps: list[Step] = [Combine(x, (), ((0, spreads[0]),))]
    for i, (a, s) in enumerate(zip(signals, spreads, strict=True)):
        p, q = (1 / a, s / a) if prediction == "epsilon" else (a if prediction == "v" else 1.0, s)
        steps.append(Call(output, x, i))
        if i == num_steps - 1:
            steps.append(Combine(x, terms((x, p), (output, -q))))
            break
        signal, spread = signals[i + 1], spreads[i + 1]
        if noise == "ddim":
            of_x, of_output = {"epsilon": (0.0, 1.0), "v": (s, a), "flow": (1.0, a)}[prediction]
            mixed = terms((x, signal * p + spread * of_x), (output, -signal * q + spread * of_output))
            steps.append(Combine(x, mixed))
        else:
            draw = i + 1 if noise == "fresh" else 0
            steps.append(Combine(x, terms((x, signal * p), (output, -signal * q)), ((draw, spread),)))
    draws = num_steps if noise == "fresh" else 1
    return Plan(tuple(steps), levels, draws, registers=2, result=x, dtype=dtype, noise_dtype=dtype)


@lru_cache(maxsize=128)
def recursive_plan(num_steps: int = 1, dtype: torch.dtype = torch.float32) -> Plan:
    """`recursive` as a plan; its one level, 0, means nothing.

    Raises:
        ValueError: num_steps < 1.
    """
    check_steps(num_steps)
    steps: list[Step] = [Combine(0, (), ((0, 1.0),)), *[Call(0, 0, 0)] * num_steps]
    return Plan(tuple(steps), (0.0,), 1, registers=1, result=0, dtype=dtype, noise_dtype=dtype)


def multistep_plan(noise_levels: Sequence[float], dtype: torch.dtype = torch.float32) -> Plan:
    """`multistep` as a plan; its one level, 0, means nothing.

    Raises:
        ValueError: a τ outside [0, 1].
    """
    if any(not 0 <= tau <= 1 for tau in noise_levels):
        raise ValueError(f"noise levels must lie in [0, 1], not {list(noise_levels)}")
    steps: list[Step] = [Combine(0, (), ((0, 1.0),)), Call(0, 0, 0)]
    for i, tau in enumerate(noise_levels, 1):
        steps += [Combine(0, terms((0, 1 - tau)), terms((i, tau))), Call(0, 0, 0)]
    draws = 1 + len(noise_levels)
    return Plan(tuple(steps), (0.0,), draws, registers=1, result=0, dtype=dtype, noise_dtype=dtype)


@lru_cache(maxsize=128)
def projection_plan(noise_levels: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Plan:
    """x ← f((1 − τ_i)·x + τ_i·ε_i) for each τ_i, from the images x = y (SIGN's editing); draw 0 is y, draw i + 1 ε_i.

    Raises:
        ValueError: no τ, or one outside [0, 1].
    """
    if not noise_levels or not all(0 <= tau <= 1 for tau in noise_levels):
        raise ValueError(f"noise levels must be in [0, 1], one at least, not {list(noise_levels)}")
    first, *rounds = noise_levels
    steps: list[Step] = [Combine(0, (), terms((0, 1 - first), (1, first))), Call(0, 0, 0)]
    for i, tau in enumerate(rounds, 2):
        steps += [Combine(0, terms((0, 1 - tau)), terms((i, tau))), Call(0, 0, 0)]
    return Plan(tuple(steps), (0.0,), 1 + len(noise_levels), registers=1, result=0, dtype=dtype, noise_dtype=dtype)


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
    plan = one_step_plan(sigma)
    return run_plan(plan, at_levels(net, plan, class_labels, latents.device), [latents])


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
    plan = few_step_plan(num_steps, sigma, latents.dtype)
    return run_plan(plan, at_levels(net, plan, class_labels, latents.device), draw_ahead(plan, latents, randn_like))


@torch.no_grad()
def few_step_latent(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 4,
    prediction: LatentPrediction = "epsilon",
    noise: StepNoise = "fresh",
    bars: tuple[float, ...] | None = None,
) -> Tensor:
    """Few-step generation with a noise-predicting, v-predicting or rectified-flow network (few-step SiD, Algorithm 1).

    "epsilon": x = √ᾱ·D + √(1−ᾱ)·n, D = (x − √(1−ᾱ)·ε(x, t))/√ᾱ at t_i = trunc(625(1 − i/K)).
    "v": the same x, D = √ᾱ·x − √(1−ᾱ)·v(x, t).
    "flow": x = (1−t)·D + t·n, D = x − t·v(x, t) at t_i = (1 − i/K)·999/999.

    Args:
        predict: predict(x, t) with t (B,), int64 steps for "epsilon" and "v", floats in (0, 1] for "flow".
        latents: (B, C, H, W) standard normal, the first noise.
        randn_like: draws fresh noise.
        num_steps: K.
        prediction: what `predict` returns.
        noise: of the steps after the first: "fresh", "fixed" (the latents again) or "ddim" (the noise that the last
            step implies).
        bars: ᾱ_t, t = 0 … 999, None for those of `alpha_bars`; unused by "flow".

    Returns:
        (B, C, H, W), the D of the last step.

    Raises:
        ValueError: as `few_step_latent_plan`.
    """
    plan = few_step_latent_plan(num_steps, prediction, noise, latents.dtype, bars)
    dtype = latents.dtype if prediction == "flow" else torch.int64
    t = [torch.full([latents.shape[0]], level, dtype=dtype, device=latents.device) for level in plan.levels]
    return run_plan(plan, lambda x, level: predict(x, t[level]), draw_ahead(plan, latents, randn_like))


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
    return run_plan(recursive_plan(num_steps, latents.dtype), lambda x, level: student(x), [latents])


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
    plan = multistep_plan(noise_levels, latents.dtype)
    return run_plan(plan, lambda x, level: student(x), draw_ahead(plan, latents, randn_like))

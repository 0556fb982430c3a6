"""Runs a `Plan`: in C++ where the extension is there, otherwise in Python, with the same numbers on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import functional
from .plan import Combine, Plan

Denoiser = Callable[[Tensor, int], Tensor]
"""denoiser(x, level) -> D, with the number of the level among the plan's."""


class Correction(Protocol):
    """What is put right after each call of the network, e.g. known pixels of the images a plan starts from."""

    @property
    def key(self) -> Hashable:
        """Equal for corrections that differ in `tensors` alone: they share a CUDA graph."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Further inputs, each (1 or B, …)."""

    def restore(self, images: Tensor, observed: Tensor, *tensors: Tensor) -> Tensor:
        """The images (B, C, H, W) as they should be, given draw 0 and `tensors` on their device."""


def corrected(denoiser: Denoiser, correction: Correction, observed: Tensor, tensors: Sequence[Tensor]) -> Denoiser:
    """The denoiser followed by the correction."""
    return lambda x, level: correction.restore(denoiser(x, level), observed, *tensors)


def draw_ahead(plan: Plan, latents: Tensor, randn_like: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """All noise of a plan in the order of its use: the latents, then plan.draws − 1 calls of randn_like.

    Args:
        latents: (B, C, H, W).
        randn_like: gets a tensor in the latents' shape and plan.noise_dtype.
    """
    if plan.draws == 1:
        return [latents]
    like = latents.to(plan.noise_dtype)
    return [latents, *(randn_like(like) for _ in range(1, plan.draws))]


def at_levels(net: Any, plan: Plan, class_labels: Tensor | None, device: torch.device) -> Denoiser:
    """net(x, sigma, class_labels) as a denoiser; sigma is a scalar float64 tensor on the device."""
    if len(plan.levels) == 1:  # filled on the device, so that a single step can be captured in a CUDA graph
        sigmas = torch.full([1], plan.levels[0], dtype=torch.float64, device=device).unbind()
    else:
        sigmas = torch.tensor(plan.levels, dtype=torch.float64).to(device).unbind()
    return lambda x, level: net(x, sigmas[level], class_labels)


@torch.no_grad()
def run_plan(plan: Plan, denoiser: Denoiser, draws: Sequence[Tensor], coefficients: Tensor | None = None) -> Tensor:
    """Follow a plan with a denoiser, called once for each of the plan's calls.

    Args:
        denoiser: any callable (x, level) -> tensor of x's shape; x is in the plan's dtype, or in the denoiser's own
            where calls follow each other. What it raises is passed on, and a signal is seen between two calls.
        draws: plan.draws tensors (B, C, H, W) of one shape and device; draw 0 is the latents.
        coefficients: (n,) float64 on the draws' device in place of plan.coefficients: an input of a CUDA graph.

    Returns:
        (B, C, H, W): plan.dtype where the plan ends with a combination, otherwise what the denoiser gave.

    Raises:
        ValueError: too few draws, or draws of several shapes or devices.
        TypeError: the denoiser gives no tensor.
    """
    if len(draws) != plan.draws:
        raise ValueError(f"this plan uses {plan.draws} draws, not {len(draws)}")
    first = draws[0]
    for draw in draws[1:]:
        if draw.shape != first.shape or draw.device != first.device:
            raise ValueError(
                f"all draws must be {tuple(first.shape)} on {first.device}, not {tuple(draw.shape)} on {draw.device}"
            )
    native = None if torch.compiler.is_compiling() else plan.native
    if native is None:
        return run_plan_reference(plan, denoiser, draws, coefficients)
    result: Tensor = native.run(denoiser, draws, coefficients)
    return result


def run_plan_reference(
    plan: Plan, denoiser: Denoiser, draws: Sequence[Tensor], coefficients: Tensor | None = None
) -> Tensor:
    """`run_plan` in plain torch: the oracle of the C++ loop."""
    states: list[Tensor] = [draws[0]] * plan.registers
    used = 0
    for step in plan.steps:
        if isinstance(step, Combine):
            if coefficients is None:
                states[step.target] = _combine(step, states, draws, plan.dtype)
                continue
            sources = [*(states[r] for r, _ in step.terms), *(draws[d] for d, _ in step.noise)]
            end = used + len(sources)
            states[step.target] = functional.combine(sources, coefficients[used:end], plan.dtype)
            used = end
        else:
            denoised = denoiser(states[step.source], step.level)
            if not isinstance(denoised, Tensor):
                raise TypeError(f"the denoiser must give a tensor, not {type(denoised).__name__}")
            states[step.target] = denoised
    return states[plan.result]


def _combine(step: Combine, states: Sequence[Tensor], draws: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    sources = [(states[r], c) for r, c in step.terms] + [(draws[d], c) for d, c in step.noise]
    (first, coefficient), *others = sources
    if not others and coefficient == 1:
        return first.to(dtype)
    total = first.to(dtype) * coefficient
    for source, coefficient in others:
        total = total + source.to(dtype) * coefficient
    return total

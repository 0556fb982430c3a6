"""A sampler as data: linear combinations of states and noise between the calls of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..kernels import extension


@dataclass(frozen=True)
class Combine:
    """state[target] = Σ coefficient·state[source] + Σ coefficient·noise[draw], in the plan's dtype.

    Args:
        target: register; may be one of the sources.
        terms: (source register, coefficient).
        noise: (draw, coefficient); draw 0 is the latents.
    """

    target: int
    terms: tuple[tuple[int, float], ...] = ()
    noise: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Call:
    """state[target] = D(state[source]; levels[level]), in the dtype that D gives."""

    target: int
    source: int
    level: int


Step: TypeAlias = Combine | Call


@dataclass(frozen=True)
class Plan:
    """What a sampler does, whatever the network, the batch and the noise.

    Args:
        steps: in order.
        levels: the second argument of each call: σ for a denoiser, unused by a time-free student.
        draws: noises that are drawn, the latents (draw 0) among them; each has the images' shape. A step need not
            use them all: the published samplers draw noise that they multiply with 0.
        registers: states, numbered from 0.
        result: the register that holds the images at the end.
        dtype: of the combinations.
        noise_dtype: in which draws 1, 2, … are drawn; the latents are float32.
    """

    steps: tuple[Step, ...]
    levels: tuple[float, ...]
    draws: int
    registers: int
    result: int
    dtype: torch.dtype = torch.float64
    noise_dtype: torch.dtype = torch.float64

    @cached_property
    def coefficients(self) -> tuple[float, ...]:
        """Those of all combinations, one after the other: states, then noise."""
        sums = [step for step in self.steps if isinstance(step, Combine)]
        return tuple(value for step in sums for _, value in (*step.terms, *step.noise))

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """The plan without its numbers: equal for plans that differ in coefficients and levels alone."""
        steps: list[tuple[Any, ...]] = []
        for step in self.steps:
            if isinstance(step, Combine):
                steps.append((step.target, tuple(r for r, _ in step.terms), tuple(d for d, _ in step.noise)))
            else:
                steps.append((step.target, step.source, step.level))
        return (tuple(steps), len(self.levels), self.draws, self.registers, self.result, self.dtype)

    @cached_property
    def native(self) -> Any:
        """The plan as the C++ loop takes it, made once; None where the extension is missing."""
        module = extension.module()
        if module is None:
            return None
        native = module.Plan(self.registers, self.draws, self.result, self.dtype)
        for step in self.steps:
            if isinstance(step, Combine):
                native.combine(step.target, step.terms, step.noise)
            else:
                native.call(step.target, step.source, step.level)
        return native


@dataclass(frozen=True)
class Prepared:
    """A plan and its numbers on the device, made at their first use."""

    plan: Plan
    device: torch.device

    @cached_property
    def levels(self) -> Tensor:
        """(n,) float64."""
        return torch.tensor(self.plan.levels, dtype=torch.float64).to(self.device)

    @cached_property
    def coefficients(self) -> Tensor:
        """Of all combinations, (n,) float64."""
        return torch.tensor(self.plan.coefficients, dtype=torch.float64).to(self.device)


class Levels:
    """Numbers the noise levels of a plan that is being written; equal ones get one number."""

    def __init__(self) -> None:
        self._numbers: dict[float, int] = {}

    def number(self, level: float) -> int:
        """The index of `level` in the plan's levels."""
        return self._numbers.setdefault(level, len(self._numbers))

    def values(self) -> tuple[float, ...]:
        """The plan's levels."""
        return tuple(self._numbers)


def terms(*pairs: tuple[int, float]) -> tuple[tuple[int, float], ...]:
    """The pairs (register or draw, coefficient) without those whose coefficient is 0."""
    return tuple(pair for pair in pairs if pair[1] != 0)

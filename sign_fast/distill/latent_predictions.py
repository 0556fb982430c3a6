"""What a latent network predicts, ε, v or a flow's velocity: how images are noised and come back (SPEC, section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..sampling.students import alpha_bars, few_step_grid

FIRST_STEP, LAST_STEP = 20, 979
"""The steps t at which the losses are taken, of 0 … 999."""


class Prediction(Protocol):
    """What a network predicts: how images are noised, and how they come back from its output."""

    time_dtype: torch.dtype
    """Of the t that the network takes."""

    def grid(self, num_steps: int) -> Sequence[float]:
        """t_0 … t_{K−1} of few-step generation."""

    def teacher_grid(self, num_steps: int) -> Sequence[float]:
        """t of a teacher's own sampling, from pure noise on."""

    def training_times(self, draws: Tensor) -> Tensor:
        """t (B,) of the losses from draws (B,): standard normal of a flow, else uniform in [0, 1)."""

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x of the images at t (B,)."""

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """D, the clean images that the network's output means."""

    def implied_noise(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """The n with x = noised(D, n, t)."""

    def target(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be."""


class EpsilonPrediction:
    """ε of a DDPM: x = √ᾱ_t·x0 + √(1−ᾱ_t)·n, D = (x − √(1−ᾱ_t)·ε)/√ᾱ_t.

    Args:
        device: of the latents; the schedule is put there once.
        bars: ᾱ_t, t = 0 … 999; None takes the "scaled_linear" schedule.
    """

    time_dtype = torch.int64

    def __init__(self, device: torch.device | str | None = None, bars: Sequence[float] | None = None) -> None:
        known = torch.tensor(alpha_bars() if bars is None else bars, dtype=torch.float32)
        self.signal = known.sqrt().to(device)
        self.spread = (1 - known).sqrt().to(device)

    def grid(self, num_steps: int) -> Sequence[float]:
        """t_i = trunc(625(1 − i/K))."""
        return few_step_grid(num_steps)

    def training_times(self, draws: Tensor) -> Tensor:
        """(B,) int64, uniform over 20 … 979, from uniform draws (B,) in [0, 1)."""
        count = LAST_STEP - FIRST_STEP + 1
        return (FIRST_STEP + (draws * count).long()).clamp(max=LAST_STEP)

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _per_sample(self.signal[t], images) * images + _per_sample(self.spread[t], images) * noise

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return (x - _per_sample(self.spread[t], x) * output) / _per_sample(self.signal[t], x)

    def implied_noise(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        return (x - _per_sample(self.signal[t], x) * denoised) / _per_sample(self.spread[t], x)

    def target(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def teacher_grid(self, num_steps: int) -> Sequence[float]:
        """From the last step of the losses on, evenly."""
        return [(LAST_STEP + 1) * (num_steps - i) // num_steps - 1 for i in range(num_steps)]


class VelocityPrediction(EpsilonPrediction):
    """v of a DDPM: v = √ᾱ_t·n − √(1−ᾱ_t)·x0, D = √ᾱ_t·x − √(1−ᾱ_t)·v (Salimans & Ho 2022).

    Args:
        device, bars: as in `EpsilonPrediction`.
    """

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return _per_sample(self.signal[t], x) * x - _per_sample(self.spread[t], x) * output

    def target(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _per_sample(self.signal[t], images) * noise - _per_sample(self.spread[t], images) * images


class FlowPrediction:
    """v of a rectified flow: x = (1−t)·x0 + t·n, v = n − x0, D = x − t·v."""

    time_dtype = torch.float32

    def grid(self, num_steps: int) -> Sequence[float]:
        """t_i = 1 − i/K."""
        return [1 - i / num_steps for i in range(num_steps)]

    def training_times(self, draws: Tensor) -> Tensor:
        """(B,) t = sigmoid(ln 2 + 1.6·n) from normal draws (B,): we read N(ln 2, 1.6) as mean and deviation."""
        return torch.sigmoid(math.log(2) + 1.6 * draws)

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _per_sample(1 - t, images) * images + _per_sample(t, images) * noise

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return x - _per_sample(t, x) * output

    def implied_noise(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        return (x - _per_sample(1 - t, x) * denoised) / _per_sample(t, x)

    def target(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - images

    def teacher_grid(self, num_steps: int) -> Sequence[float]:
        """From t = 1 on, evenly."""
        return self.grid(num_steps)


PredictionType = Literal["epsilon", "v", "flow"]


def prediction_of(
    kind: PredictionType, device: torch.device | str | None = None, bars: Sequence[float] | None = None
) -> Prediction:
    """The prediction of a pipeline.

    Args:
        kind: what its network predicts.
        device: of the latents.
        bars: ᾱ_t of its scheduler, None for a flow.
    """
    if kind == "flow":
        return FlowPrediction()
    return (EpsilonPrediction if kind == "epsilon" else VelocityPrediction)(device, bars)


FLOW_WEIGHTS = ("1/omega", "1-t", "(1-t)/t", "((1-t)/t)^2")


def flow_weight(name: str, t: Tensor) -> Tensor | None:
    """The student loss's weight (B,) at t (B,), one of `FLOW_WEIGHTS`; None for "1/omega", which the loss makes itself.

    "1-t" is the published default.

    Raises:
        ValueError: an unknown name.
    """
    if name not in FLOW_WEIGHTS:
        raise ValueError(f"the weight must be one of {', '.join(FLOW_WEIGHTS)}, not {name!r}")
    if name == "1/omega":
        return None
    if name == "1-t":
        return 1 - t
    ratio = (1 - t) / t
    return ratio if name == "(1-t)/t" else ratio**2


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))

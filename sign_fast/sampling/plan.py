"""A sampler as data: linear combinations of states and noise between the calls of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class Combine:
    """state[target] = Σ coefficient·state[source] + Σ coefficient·noise[draw].

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
    """state[target] = D(state[source]; levels[level])."""

    target: int
    source: int
    level: int


@dataclass(frozen=True)
class Plan:
    """What a sampler does, whatever the network, the batch and the noise.

    Args:
        steps: in order.
        levels: the second argument of each call: σ for a denoiser, unused by a time-free student.
        draws: noises that are used, the latents (draw 0) among them; each has the images' shape.
        registers: states, numbered from 0.
        result: the register that holds the images at the end.
        dtype: of the states.
        noise_dtype: in which draws 1, 2, … are drawn; the latents are float32.
    """

    steps: tuple[Combine | Call, ...]
    levels: tuple[float, ...]
    draws: int
    registers: int
    result: int
    dtype: torch.dtype = torch.float64
    noise_dtype: torch.dtype = torch.float64


Step: TypeAlias = Combine | Call

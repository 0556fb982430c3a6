"""The random numbers of an iteration, as a function of (seed, iteration, sample, stream) alone."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from .. import functional
from ..training.seeds import seed_of


class Stream(IntEnum):
    """What a draw is for. Of a repeated fake update the streams are moved by a multiple of REPEAT."""

    FAKE_LATENT = 0
    FAKE_LEVEL = 1
    FAKE_NOISE = 2
    FAKE_LABEL = 3
    STUDENT_LATENT = 4
    STUDENT_LEVEL = 5
    STUDENT_NOISE = 6
    STUDENT_LABEL = 7
    FLOW_LEVEL = 8
    FLOW_NOISE = 9
    FAKE_PROMPT = 10  # whether it is dropped
    STUDENT_PROMPT = 11
    FAKE_RENOISE = 64  # + i: after call i of a few-step roll-out
    STUDENT_RENOISE = 128
    REPEAT = 256


class Draws:
    """Draws of one process for its samples of one iteration, made on their device by Philox.

    No generator has a state: splitting a batch over processes or in parts, or resuming, changes no draw, and a CUDA
    graph takes `seeds` as an input.

    Args:
        seeds: (n,) int64, one a sample.
        repeat: of an update that an iteration makes several times, which one.
        batch: (B,) int64 seeds of the whole batch over all processes; None: these are all.
    """

    def __init__(self, seeds: Tensor, repeat: int = 0, batch: Tensor | None = None) -> None:
        self.seeds = seeds
        self.repeat = repeat
        self.batch = batch

    @staticmethod
    def seeds_at(seed: int, iteration: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
        """(count,) int64 seeds of the global batch's samples first, first + 1, …, on the device."""
        base = seed_of(seed, iteration) >> 1  # room for the sample's number
        return torch.arange(base + first, base + first + count, dtype=torch.int64, device=device)

    def part(self, chunk: slice) -> Draws:
        """Those of some of these samples."""
        batch = self.seeds if self.batch is None else self.batch
        return Draws(self.seeds[chunk].contiguous(), self.repeat, batch)

    def repeated(self, repeat: int) -> Draws:
        """Fresh draws for the same samples."""
        return Draws(self.seeds, repeat, self.batch)

    def of_batch(self) -> Draws:
        """Those of the whole batch, these themselves where they are."""
        return self if self.batch is None else Draws(self.batch, self.repeat)

    def normal(self, stream: int, shape: tuple[int, int, int]) -> Tensor:
        """(n, C, H, W) float32 standard normal."""
        stream += self.repeat * Stream.REPEAT
        return functional.philox_normal(self.seeds, stream, shape, memory_format=torch.channels_last)

    def uniform(self, stream: int) -> Tensor:
        """(n, 1, 1, 1) float32 in [0, 1)."""
        normal = self.normal(stream, (1, 1, 1))
        return (0.5 * (1 + torch.erf(normal / math.sqrt(2)))).clamp(0, 1 - 2**-24)

    def labels(self, stream: int, label_dim: int) -> Tensor | None:
        """(n, label_dim) float32 one-hot rows of uniform classes; None without classes."""
        if label_dim == 0:
            return None
        classes = (self.uniform(stream).reshape(-1, 1) * label_dim).long()
        return (classes == torch.arange(label_dim, device=classes.device)).float()

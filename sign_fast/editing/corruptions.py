"""Corruptions that leave nothing of an image exactly known; images are (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..errors import SignFastError

_STREAM = (1 << 32) - 2  # of the seeds' philox streams: no sampler and no drawing of labels comes to it


class Corruption(Protocol):
    """What an image has lost."""

    def check(self, shape: Sequence[int]) -> None:
        """Raise SignFastError unless it can be done to images (B, C, H, W)."""

    def corrupt(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """What is left of the images; a seed an image names what is drawn."""


@dataclass(frozen=True)
class AddedNoise:
    """Gaussian noise, clipped to [-1, 1] as in an image file.

    Args:
        std: its standard deviation on the scale of [-1, 1].

    Raises:
        SignFastError: std is not a positive number.
    """

    std: float

    def __post_init__(self) -> None:
        if not (self.std > 0 and math.isfinite(self.std)):
            raise SignFastError(f"the noise that is added must have a positive standard deviation, not {self.std}")

    def check(self, shape: Sequence[int]) -> None:
        """Any images."""

    def corrupt(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """images + std·n; n depends on the image's seed alone and is not the noise of the edit."""
        numbers = torch.tensor(list(seeds), dtype=torch.int64, device=images.device)
        noise = functional.philox_normal(numbers, _STREAM, (images.shape[1], images.shape[2], images.shape[3]))
        return (images + self.std * noise).clamp(-1, 1)


@dataclass(frozen=True)
class Blur:
    """The mean of the 3 × 3 pixels around each, those at the border repeated."""

    def check(self, shape: Sequence[int]) -> None:
        """Any images."""

    def corrupt(self, images: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


@dataclass(frozen=True)
class Edges:
    """A sketch: length of the gradient (central differences), bright on dark, an image's strongest edge at 1."""

    def check(self, shape: Sequence[int]) -> None:
        """Any images."""

    def corrupt(self, images: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        strength = torch.hypot(across, down).mean(1, keepdim=True)
        strongest = strength.amax((2, 3), keepdim=True).clamp_min(1e-6)  # an even image has no edges
        return (2 * strength / strongest - 1).expand_as(images).contiguous()

"""What an edit must keep of the image it starts from: known pixels, luma, patch means.

Each class knows both sides: `corrupt` leaves of an image what is known of it, `restore` puts that back into a result.
Images are (B, C, H, W) in [-1, 1]. All satisfy `sampling.loop.Correction`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SignFastError

_LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as JPEG has it


class KnownPixels:
    """Inpainting: the pixels of a mask are known, the others are to be painted.

    Args:
        known: (H, W), or (B, 1, H, W) for a mask an image; True where a pixel is known.

    Raises:
        SignFastError: another shape or dtype, or a mask with no known or no unknown pixel.
    """

    def __init__(self, known: Tensor) -> None:
        if known.dtype != torch.bool or known.ndim not in (2, 4) or (known.ndim == 4 and known.shape[1] != 1):
            raise SignFastError(
                f"a mask is a bool tensor (H, W) or (B, 1, H, W), not {known.dtype} {tuple(known.shape)}"
            )
        self.known = known if known.ndim == 4 else known[None, None]
        if self.known.flatten(1).all(1).any():
            raise SignFastError("the mask leaves nothing to paint: mark the unknown pixels")
        if not self.known.flatten(1).any(1).all():
            raise SignFastError("the mask leaves no pixel known: mark fewer pixels, or generate new images")

    @property
    def key(self) -> Hashable:
        return "known pixels"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.known,)

    def check(self, shape: Sequence[int]) -> None:
        """Raise SignFastError unless it fits images (B, C, H, W)."""
        batch, _, *size = shape
        if list(self.known.shape[2:]) != list(size):
            raise SignFastError(
                f"the mask is {_size(self.known.shape)}, the images are {_size(shape)}: resize the mask"
            )
        if len(self.known) not in (1, batch):
            raise SignFastError(f"{len(self.known)} masks for {batch} images: give one, or one an image")

    def corrupt(self, images: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        """The unknown pixels become the mean of their image's known ones, channel by channel."""
        known = self.known.to(images.device)
        mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        return torch.where(known, images, mean)

    def restore(self, images: Tensor, observed: Tensor, *tensors: Tensor) -> Tensor:
        """The known pixels of `observed`, to the bit."""
        (known,) = tensors
        return torch.where(known, observed, images)


@dataclass(frozen=True)
class Luma:
    """Colourisation: the luma 0.299·R + 0.587·G + 0.114·B of every pixel is known."""

    @property
    def key(self) -> Hashable:
        return self

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def check(self, shape: Sequence[int]) -> None:
        """Raise SignFastError unless images (B, C, H, W) have colour."""
        if shape[1] != 3:
            raise SignFastError(
                f"colourisation needs a network of RGB images: this one's have {shape[1]} channel(s), "
                "choose another task"
            )

    def corrupt(self, images: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        """Grey, in three equal channels."""
        return self._luma(images).expand_as(images).contiguous()

    def restore(self, images: Tensor, observed: Tensor, *tensors: Tensor) -> Tensor:
        """The colours of `images`, less saturated where they would leave [-1, 1], at the luma of `observed`."""
        images = images.clamp(-1, 1)
        return _around(self._luma(observed).clamp(-1, 1), images - self._luma(images), dims=(1,))

    @staticmethod
    def _luma(images: Tensor) -> Tensor:
        red, green, blue = images.unbind(1)
        return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


@dataclass(frozen=True)
class PatchMeans:
    """Super-resolution: the mean of every factor × factor patch of each channel is known.

    Args:
        factor: at least 2; divides the images' height and width.

    Raises:
        SignFastError: factor < 2.
    """

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise SignFastError(f"the factor of super-resolution must be at least 2, not {self.factor}")

    @property
    def key(self) -> Hashable:
        return self

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def check(self, shape: Sequence[int]) -> None:
        """Raise SignFastError unless images (B, C, H, W) are whole numbers of patches."""
        if shape[2] % self.factor or shape[3] % self.factor:
            raise SignFastError(f"images of {_size(shape)} pixels have no patches of {self.factor}×{self.factor}")

    def corrupt(self, images: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        """Every patch is its mean."""
        patches = self._patches(images)
        return patches.mean((3, 5), keepdim=True).expand_as(patches).reshape(images.shape)

    def enlarge(self, small: Tensor) -> Tensor:
        """(B, C, H/factor, W/factor) images whose pixels become patches."""
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def restore(self, images: Tensor, observed: Tensor, *tensors: Tensor) -> Tensor:
        """The detail of `images`, weaker where it would leave [-1, 1], around the patch means of `observed`."""
        patches = self._patches(images.clamp(-1, 1))
        means = self._patches(observed).mean((3, 5), keepdim=True).clamp(-1, 1)
        return _around(means, patches - patches.mean((3, 5), keepdim=True), dims=(3, 5)).reshape(images.shape)

    def _patches(self, images: Tensor) -> Tensor:
        """(B, C, H/f, f, W/f, f)."""
        batch, channels, height, width = images.shape
        f = self.factor
        return images.reshape(batch, channels, height // f, f, width // f, f)


def _around(centre: Tensor, deviation: Tensor, dims: tuple[int, ...]) -> Tensor:
    """centre + s·deviation with the largest s ≤ 1 along `dims` that stays in [-1, 1]: no clipping moves the centre."""
    room = (1 - centre * deviation.sign()) / deviation.abs().clamp_min(1e-12)
    return centre + room.amin(dims, keepdim=True).clamp_max(1) * deviation


def _size(shape: Sequence[int]) -> str:
    return f"{shape[3]}×{shape[2]}"

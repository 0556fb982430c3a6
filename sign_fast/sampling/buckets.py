"""Batch sizes in which images are made: 1, 2, 4, …, so that a few captured graphs serve every batch."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_BUCKET = 512


def bucket_of(batch: int, largest: int = LARGEST_BUCKET) -> int:
    """The batch size in which `batch` images are made: the next power of two, at most `largest`.

    Raises:
        ValueError: batch < 1.
    """
    if batch < 1:
        raise ValueError(f"a batch has at least one image, not {batch}")
    return min(1 << (batch - 1).bit_length(), largest)


def thrifty_bucket_of(batch: int, largest: int = LARGEST_BUCKET) -> int:
    """The same where at most a quarter of it would be padding, else half of it: for networks that fill a GPU alone.

    Raises:
        ValueError: batch < 1.
    """
    bucket = bucket_of(batch, largest)
    return bucket if 4 * batch >= 3 * bucket else bucket // 2


def pad(tensor: Tensor, bucket: int, dim: int = 0) -> Tensor:
    """`tensor` with its last row along `dim` repeated up to `bucket` rows; the tensor itself where it has as many."""
    missing = bucket - tensor.shape[dim]
    if missing == 0:
        return tensor
    last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
    return torch.cat([tensor, last.repeat_interleave(missing, dim, output_size=missing)], dim)

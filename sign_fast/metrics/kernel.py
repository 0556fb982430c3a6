"""Kernel distance (KID): the squared maximum mean discrepancy of features (Bińkowski et al. 2018)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import SignFastError
from .arrays import Features, as_tensor

SUBSETS = 100
SUBSET_SIZE = 1000


class MeanAndDeviation(NamedTuple):
    """Mean and standard deviation (of the population, as published) over subsets or splits."""

    mean: float
    std: float


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/D + 1)³ of (M, D) and (N, D) -> (M, N)."""
    base = torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1])
    return base.square().mul_(base)


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of MMD² with the cubic kernel (eq. 4); may be below 0.

    Args:
        x, y: (M, D), float64 for the usual accuracy.

    Returns:
        Scalar tensor.
    """
    m = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (polynomial_kernel(x, x), polynomial_kernel(y, y)))
    return torch.as_tensor(within / (m * (m - 1)) - 2 * polynomial_kernel(x, y).mean())


@torch.no_grad()
def kernel_distance(
    features: Features,
    reference: Features,
    *,
    subsets: int = SUBSETS,
    subset_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> MeanAndDeviation:
    """KID: MMD² of random subsets of equal size, each drawn without replacement, in float64.

    Args:
        features, reference: (N, D) and (M, D), arrays or tensors.
        subsets: how many.
        subset_size: None means min(1000, N, M), as the StyleGAN metrics have it.
        seed: of the draws.
        device: where to compute; a subset of each is sent there at a time.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        SignFastError: fewer images than a subset has, widths that differ, or values that are not finite.
    """
    x, y = as_tensor(features, "features"), as_tensor(reference, "reference", width=features.shape[1])
    fewest = min(len(x), len(y))
    size = min(SUBSET_SIZE, fewest) if subset_size is None else subset_size
    if size < 2 or subsets < 1:
        raise SignFastError(f"the kernel distance needs subsets of at least 2 images, not {subsets} of {size}")
    if size > fewest:
        raise SignFastError(
            f"a subset of {size} images is more than there are ({len(x)}, reference {len(y)}): take more images or "
            "smaller subsets"
        )
    draws = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        parts = (torch.from_numpy(draws.choice(len(rows), size, replace=False)) for rows in (x, y))
        values.append(squared_mmd(*(rows[part].to(device).double() for rows, part in zip((x, y), parts, strict=True))))
    found = torch.stack(values)
    return MeanAndDeviation(float(found.mean()), float(found.std(correction=0)))

"""Improved precision and recall of features (Kynkäänniemi et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SignFastError
from .arrays import Features, as_tensor

NEIGHBOURS = 3
_BLOCK = 4096


class PrecisionRecall(NamedTuple):
    """Precision: share of the images within the reference's manifold; recall: share of the reference in the images'."""

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(
    features: Features,
    reference: Features,
    *,
    neighbours: int = NEIGHBOURS,
    block: int = _BLOCK,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Whether images lie within the balls of the other set, each ball as wide as its k-th nearest neighbour is far.

    Distances are computed in float64, block² at a time: beside the features, memory does not depend on their number.

    Args:
        features, reference: (N, D) and (M, D), arrays or tensors of any float dtype.
        neighbours: k.
        block: rows and columns of a block.
        device: where to compute.

    Raises:
        SignFastError: fewer than k + 1 images, widths that differ, or values that are not finite.
    """
    x, y = as_tensor(features, "features"), as_tensor(reference, "reference", width=features.shape[1])
    if neighbours < 1 or min(len(x), len(y)) <= neighbours:
        raise SignFastError(
            f"precision and recall with {neighbours} neighbours need at least {neighbours + 1} images, not {len(x)} "
            f"and {len(y)} of the reference"
        )
    # distances do not change, and float64's rounding is then that of the spread, not of the mean
    centre = torch.stack([rows.to(device).double().sum(0) for rows in y.split(block)]).sum(0) / len(y)
    radii_x, radii_y = (_radii(rows, centre, neighbours, block, device) for rows in (x, y))
    in_y = torch.zeros(len(x), dtype=torch.bool, device=device)
    in_x = torch.zeros(len(y), dtype=torch.bool, device=device)
    for i, a in _blocks(x, centre, block, device):
        for j, b in _blocks(y, centre, block, device):
            near = _squared_distances(a, b)
            in_y[i] |= (near <= radii_y[j]).any(1)
            in_x[j] |= (near <= radii_x[i, None]).any(0)
    return PrecisionRecall(float(in_y.double().mean()), float(in_x.double().mean()))


def _blocks(rows: Tensor, centre: Tensor, block: int, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(rows), block):
        part = rows[start : start + block].to(device).double() - centre
        yield slice(start, start + len(part)), part


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² of (M, D) and (N, D) float64; exactly 0 where it is no more than equal rows leave by rounding."""
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    found = torch.addmm(scale, a, b.T, alpha=-2)
    equal = found <= scale.mul_(a.shape[1] * torch.finfo(torch.float64).eps)
    return found.masked_fill_(equal, 0)


def _radii(rows: Tensor, centre: Tensor, k: int, block: int, device: torch.device | str) -> Tensor:
    """(N,) squared distance of each row to its k-th nearest other."""
    found = []
    for _, a in _blocks(rows, centre, block, device):
        nearest = torch.empty(len(a), 0, dtype=torch.float64, device=device)
        for _, b in _blocks(rows, centre, block, device):
            near = torch.cat([nearest, _squared_distances(a, b)], 1)
            nearest = near.topk(min(k + 1, near.shape[1]), largest=False).values  # the row itself is one, at 0
        found.append(nearest[:, k])
    return torch.cat(found)

"""What is measured of any map f: its iterates, and how far they move."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Map = Callable[[Tensor, Tensor | None], Tensor]
"""f(u, labels) -> (B, C, H, W)."""


@torch.no_grad()
def iterates(f: Map, u: Tensor, labels: Tensor | None, count: int, batch: int = 500) -> list[Tensor]:
    """[u, f(u), f(f(u)), …], count + 1 of them."""
    found = [u]
    for _ in range(count):
        parts = [
            f(found[-1][start : start + batch], None if labels is None else labels[start : start + batch])
            for start in range(0, len(u), batch)
        ]
        found.append(torch.cat(parts).to(u.dtype))
    return found


def rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean of (a − b)² over all pixels."""
    return float((a.double() - b.double()).square().mean().sqrt())


def moves(found: list[Tensor]) -> list[float]:
    """RMS of ‖f^{k+1} − f^k‖ for k = 0, 1, … of `iterates`; k = 0 is ‖f(u) − u‖."""
    return [rms(after, before) for before, after in pairwise(found)]

"""The combination's Triton kernel. A program takes a run of the elements, in whatever order all tensors share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _term(x, coefficient, at, mask, y):
    wide: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    return tl.load(coefficient).to(wide) * tl.load(x + at, mask, other=0.0).to(wide)


@triton.jit
def combine(x0, x1, x2, x3, x4, x5, x6, x7, coefficients, y, elements, BLOCK: tl.constexpr):
    """y = Σ coefficients[j]·xj, added from the left; states that there are not are None."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    mask = at < elements
    total = _term(x0, coefficients, at, mask, y)
    if x1 is not None:
        total += _term(x1, coefficients + 1, at, mask, y)
    if x2 is not None:
        total += _term(x2, coefficients + 2, at, mask, y)
    if x3 is not None:
        total += _term(x3, coefficients + 3, at, mask, y)
    if x4 is not None:
        total += _term(x4, coefficients + 4, at, mask, y)
    if x5 is not None:
        total += _term(x5, coefficients + 5, at, mask, y)
    if x6 is not None:
        total += _term(x6, coefficients + 6, at, mask, y)
    if x7 is not None:
        total += _term(x7, coefficients + 7, at, mask, y)
    tl.store(y + at, total, mask)

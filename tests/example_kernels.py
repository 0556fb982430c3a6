"""Small Triton kernels that the tests of the tools themselves work on: compilation ahead of time, byte counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sign_fast.kernels.launch import Launch

BLOCK = 1024


@triton.jit
def add_kernel(x, skip, y, n, scale, BLOCK: tl.constexpr, NAME: tl.constexpr = "D"):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    if skip is not None:
        value += tl.load(skip + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, (value * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def hold_kernel(x, y, BLOCK: tl.constexpr):
    """All values are alive at the sum: with one warp more than its registers hold, so that some are spilled."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(y + i, value / tl.sum(value))


@triton.jit
def product_kernel(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + i, tl.dot(tl.load(a + i), tl.load(b + i)))


@triton.jit
def count_kernel(x, total, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


@triton.jit
def repeat_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0) * BLOCK + i, tl.load(x + i // 2))


@triton.jit(do_not_specialize=["as_is"], do_not_specialize_on_alignment=["pointer"])
def annotated_kernel(x, as_is, wide: tl.int64, real: tl.float32, pointer, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(pointer + i) * real + as_is + wide)


@triton.jit
def block_kernel(x, y, rows, columns, BLOCK: tl.constexpr):
    """Copies a matrix by tensor descriptors, which leave out what lies past its end."""
    source = tl.make_tensor_descriptor(x, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK])
    target.store([0, 0], source.load([0, 0]))


@triton.jit
def whole_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + tl.load(x))


def add(x: Tensor, skip: Tensor | None, y: Tensor, scale: float = 1.0, num_warps: int = 4) -> Launch:
    n = y.numel()
    arguments = {"x": x, "skip": skip, "y": y, "n": n, "scale": scale}
    return Launch(add_kernel, (triton.cdiv(n, BLOCK),), arguments, {"BLOCK": BLOCK}, num_warps)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

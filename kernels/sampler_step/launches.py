"""The sampler step as Triton launches: from tensors, real or on the meta device, to what runs on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..device import Device
from ..dispatch import Reason
from ..launch import Kernels, Launch
from .config import Call, plan

_kernels = Kernels("sampler_step.triton_kernels")

# no fused multiply-adds: the bits are those of plain torch, whatever the layout
Unfused = partial(Launch, enable_fp_fusion=False)


def shape_reason(elements: int) -> Reason | None:
    """None when the Triton kernels take an image of so many elements."""
    return Reason(f"an image of {elements} elements has 2³⁰ or more") if elements >= 2**30 else None


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """(batch, channel, pixel) strides where one stride steps from pixel to pixel, else None."""
    batch, channel, row, pixel = x.stride()
    _, channels, height, width = x.shape
    if width == 1:
        pixel = row
    elif height > 1 and row != width * pixel:
        return None
    if channels == 1:
        channel = height * width * pixel
    if height * width == 1:
        pixel = 1
    return (batch, channel, pixel) if channels * channel + height * width * pixel < 2**31 else None


def readable(x: Tensor) -> Tensor:
    """x itself where the kernels can step through it, else a dense copy."""
    return x if _strides(x) is not None else x.contiguous()


def _named(prefix: str, x: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if x is None else _strides(x)
    assert strides is not None, "readable() comes first"
    return dict(zip((f"{prefix}_batch", f"{prefix}_channel", f"{prefix}_pixel"), strides, strict=True))


def _flat(x: Tensor | None) -> bool:
    """Whether an image's elements lie in C, H, W order."""
    return x is not None and _strides(x) is not None and _strides(x)[1:] == (x.shape[2] * x.shape[3], 1)  # type: ignore[index]


def _flat_last(x: Tensor | None) -> bool:
    """Whether an image's elements lie in H, W, C order."""
    return x is not None and _strides(x) is not None and _strides(x)[1:] == (1, x.shape[1])  # type: ignore[index]


def _rows(**vectors: Tensor | None) -> dict[str, Any]:
    """(B,) or (1,) vectors and their strides from image to image."""
    strides = {f"{name}_row": 0 if t is None or t.shape[0] == 1 else 1 for name, t in vectors.items()}
    return {**vectors, **strides}


def _signed(step: int) -> int:
    """The low 32 bits of a step, as Triton's int32."""
    return (step + 2**31) % 2**32 - 2**31


def launches_noise(seeds: Tensor, step: int, y: Tensor, scale: float, device: Device) -> list[Launch]:
    """y = scale·n; y dense."""
    batch, channels, height, width = y.shape
    elements = channels * height * width
    p = plan(Call(batch, elements), device)
    chunks = -(-elements // p.elements)
    arguments: dict[str, Any] = {
        "seeds": seeds,
        "y": y,
        "step": _signed(step),
        "scale": float(scale),
        "chunks": chunks,
        "elements": elements,
        "pixels": height * width,
        **_named("y", y),
    }
    del arguments["y_batch"]
    constants = {"BLOCK": p.elements // 4, "FLAT": _flat(y)}
    return [Unfused(_kernels.noise, (batch * chunks,), arguments, constants, p.num_warps)]


def launches_forward(
    x: Tensor,
    network_output: Tensor | None,
    y: Tensor,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    device: Device,
    *,
    seeds: Tensor | None = None,
    step: int = 0,
    scale: Tensor | None = None,
    sigma: Tensor | None = None,
) -> list[Launch]:
    """Into y, dense: the bytes where it is uint8 (B, H, W, C), else the next state; x, network_output `readable`."""
    to_bytes = y.dtype == torch.uint8
    batch, channels, height, width = x.shape
    elements = channels * height * width
    p = plan(Call(batch, elements, to_bytes), device)
    chunks = -(-elements // p.elements)
    arguments: dict[str, Any] = {
        "x": x,
        "f": network_output,
        "y": y,
        "chunks": chunks,
        "elements": elements,
        **_named("x", x),
        **_named("f", network_output),
        **_rows(c_skip=c_skip, c_out=c_out),
    }
    if to_bytes:
        arguments["channels"] = channels
        constants = {"BLOCK": p.elements, "X_FLAT": _flat_last(x), "F_FLAT": _flat_last(network_output)}
        return [Unfused(_kernels.to_bytes, (batch * chunks,), arguments, constants, p.num_warps)]
    arguments |= {
        "seeds": seeds,
        "step": _signed(step),
        "pixels": height * width,
        **_named("y", y),
        **_rows(scale=scale, sigma=sigma),
    }
    del arguments["y_batch"]
    constants = {
        "BLOCK": p.elements // 4,
        "X_FLAT": _flat(x),
        "F_FLAT": _flat(network_output),
        "Y_FLAT": _flat(y),
    }
    return [Unfused(_kernels.advance, (batch * chunks,), arguments, constants, p.num_warps)]


def dense_like(x: Tensor) -> Tensor:
    """An empty tensor in x's memory format, dense."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))

"""GroupNorm–SiLU as Triton launches: from tensors, real or on the meta device, to what runs on a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..device import Device
from ..dispatch import Reason
from ..launch import Kernels, Launch
from .config import MAX_GROUP_CHANNELS, Call, Plan, plan, power_of_two

_forward = Kernels("group_norm_silu.triton_kernels")
_backward = Kernels("group_norm_silu.triton_backward")

LARGEST = 2**31 - 2**16  # offsets within a sample are int32, and those of masked lanes must not wrap around either


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=suggest_memory_format(x))


def like(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty tensor in x's memory format, dense, with another number of channels where that is given."""
    batch, own, height, width = x.shape
    return torch.empty(
        (batch, channels or own, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=suggest_memory_format(x),
    )


def shape_reason(x: Tensor, x2: Tensor | None, num_groups: int) -> Reason | None:
    """None when the Triton kernels take these shapes."""
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    if channels // num_groups > MAX_GROUP_CHANNELS:
        return Reason(f"a group of {channels // num_groups} channels is wider than {MAX_GROUP_CHANNELS}")
    if channels * x.shape[2] * x.shape[3] >= LARGEST:
        return Reason("one sample has 2³¹ − 2¹⁶ elements or more")
    if 3 * x.shape[0] * channels >= 2**31:
        return Reason("samples times channels are 2³¹/3 or more")
    return None


@lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    _, channels, height, width = shape
    batch, channel, row, pixel = strides
    if width == 1:
        pixel = row
    elif height > 1 and row != width * pixel:
        return None
    if height * width == 1:
        pixel = channels
    if (channels - 1) * channel + (height * width - 1) * pixel >= LARGEST:
        return None
    return (batch, pixel, channel) if 1 in (pixel, channel) or channels == 1 else None


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """(batch, pixel, channel) strides where one stride steps from pixel to pixel, else None."""
    return _steps(x.shape, x.stride())


def readable(x: Tensor) -> Tensor:
    """x itself where the kernels can step through it, else a dense copy."""
    return x if _strides(x) is not None else dense(x)


@lru_cache(maxsize=4096)
def _names(prefix: str, strides: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip((f"{prefix}_batch", f"{prefix}_pixel", f"{prefix}_channel"), strides, strict=True))


def _named(prefix: str, x: Tensor | None) -> dict[str, int]:
    """Strides as arguments; shared, not to be changed."""
    strides = (0, 0, 0) if x is None else _strides(x)
    assert strides is not None, "readable() comes first"
    return _names(prefix, strides)


def _row(t: Tensor | None) -> int:
    """Row stride of a (B, C) or (1, C) tensor."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def rows(t: Tensor | None) -> Tensor | None:
    """t with neighbouring channels next to each other, copied only if they are not or rows lie too far apart."""
    if t is None or ((t.shape[-1] == 1 or t.stride(-1) == 1) and t.shape[0] * t.stride(0) < LARGEST):
        return t
    return t.contiguous()


def _channels_last(x: Tensor) -> bool:
    strides = _strides(x)
    return strides is not None and strides[2] == 1


_call = lru_cache(maxsize=4096)(Call)


class _Shape:
    """What every launch of one call shares."""

    def __init__(self, call: Call, first_channels: int, chosen: Plan):
        self.batch, self.channels, self.plan = call.batch, call.channels, chosen
        bundles = -(-call.channels // chosen.bundle)
        self.spans = -(-call.pixels // chosen.span)
        programs = call.batch * bundles
        self.grid: tuple[int, ...] = (programs, self.spans) if chosen.strategy == "split" else (programs,)
        self.arguments = {
            "bundles": bundles,
            "channels": call.channels,
            "first_channels": first_channels,
            "pixels": call.pixels,
        }
        self.span_arguments = self.arguments | {"span": chosen.span}
        self.constants: dict[str, bool | int] = {
            "GROUP_CHANNELS": call.channels // call.groups,
            "BUNDLE": chosen.bundle,
            "BLOCK_C": chosen.block_channels,
            "BLOCK_P": chosen.block_pixels,
            "EVEN_P": call.pixels % chosen.block_pixels == 0,
            "EVEN_C": chosen.bundle == chosen.block_channels and call.channels % chosen.bundle == 0,
            "PAIR": call.pair,
        }
        self.group_constants = self.constants | {"BLOCK_G": power_of_two(chosen.bundle * call.groups // call.channels)}


_shape = lru_cache(maxsize=4096)(_Shape)


def _shape_of(x: Tensor, x2: Tensor | None, num_groups: int, device: Device, backward: bool, joins: bool) -> _Shape:
    batch, first, height, width = x.shape
    channels, pair = (first, False) if x2 is None else (first + x2.shape[1], True)
    memory = (x.element_size(), _channels_last(x))
    call = _call(batch, channels, height * width, num_groups, *memory, backward, joins, pair, x.dtype == torch.float16)
    return _shape(call, first, plan(call, device))


def launches_forward(
    x: Tensor,
    x2: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    device: Device,
    *,
    emb: Tensor | None = None,
    input_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    skip: Tensor | None = None,
    r: Tensor | None = None,
    join_bias: Tensor | None = None,
    skip_scale: float = 1.0,
) -> list[Launch]:
    """Forward launches into y, stats and (residual form: skip given) r; every tensor `readable`, rows by `rows`."""
    shape = _shape_of(x, x2, num_groups, device, False, skip is not None)
    geometry = {**_named("x", x), **_named("x2", x2), **_named("y", y)}
    statistics = {"emb": emb, "input_bias": input_bias, "emb_row": _row(emb)}
    joined = {"skip": skip, "r": r, "join_bias": join_bias, "skip_scale": skip_scale}
    affine = {
        "weight": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "scale_row": _row(scale),
        "shift_row": _row(shift),
    }
    every: dict[str, Any] = {"x": x, "x2": x2, **geometry, **statistics}
    join, warps = skip is not None, shape.plan.num_warps
    if shape.plan.strategy != "split":
        kernel = _forward.forward_tile if shape.plan.strategy == "tile" else _forward.forward_loop
        arguments = {**every, **joined, **affine, **shape.arguments, "y": y, "stats": stats, "eps": eps}
        return [Launch(kernel, shape.grid, arguments, shape.group_constants | {"JOIN": join, "SILU": silu}, warps)]

    workspace = torch.empty((shape.batch, shape.spans, num_groups, 3), dtype=torch.float32, device=x.device)
    every |= shape.span_arguments
    first = Launch(
        _forward.forward_partial,
        shape.grid,
        {**every, **joined, "workspace": workspace},
        shape.group_constants | {"JOIN": join},
        warps,
    )
    if r is not None:  # the second launch reads the stream that the first one wrote
        every |= {"x": r, **_named("x", r)}
    second = Launch(
        _forward.forward_apply,
        shape.grid,
        {**every, **affine, "y": y, "stats": stats, "workspace": workspace, "spans": shape.spans, "eps": eps},
        shape.constants | {"BLOCK_S": power_of_two(shape.spans), "SILU": silu},
        warps,
    )
    return [first, second]


def launches_backward(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    dx: Tensor,
    dx2: Tensor | None,
    sums: Tensor,
    stats: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    device: Device,
    *,
    emb: Tensor | None = None,
    input_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    stream: Tensor | None = None,
    skip_scale: float = 1.0,
    input_sum: bool = False,
) -> list[Launch]:
    """Backward launches into dx, dx2 and sums (3, B, C); dy and stream share their strides."""
    shape = _shape_of(x, x2, num_groups, device, True, stream is not None)
    arguments: dict[str, Any] = {
        "dy": dy,
        "x": x,
        "x2": x2,
        "stats": stats,
        "weight": weight,
        "bias": bias,
        "emb": emb,
        "input_bias": input_bias,
        "scale": scale,
        "shift": shift,
        "emb_row": _row(emb),
        "scale_row": _row(scale),
        "shift_row": _row(shift),
        **_named("x", x),
        **_named("x2", x2),
        **_named("y", dy),
    }
    result = {
        "stream": stream,
        "dx": dx,
        "dx2": dx2,
        "skip_scale": skip_scale,
        **_named("dx", dx),
        **_named("dx2", dx2),
    }
    constants = {"SILU": silu, "INPUT_SUM": input_sum}
    warps, plane = shape.plan.num_warps, shape.batch * shape.channels
    if shape.plan.strategy != "split":
        kernel = _backward.backward_tile if shape.plan.strategy == "tile" else _backward.backward_loop
        arguments |= {**result, **shape.arguments, "sums": sums, "plane": plane}
        return [Launch(kernel, shape.grid, arguments, shape.group_constants | constants, warps)]

    spans = shape.spans
    workspace = torch.empty((3, shape.batch, spans, shape.channels), dtype=torch.float32, device=x.device)
    arguments |= {**shape.span_arguments, "workspace": workspace, "plane": plane * spans}
    block_s = power_of_two(spans)
    first = Launch(_backward.backward_partial, shape.grid, dict(arguments), shape.constants | {"SILU": silu}, warps)
    second = Launch(
        _backward.backward_apply,
        shape.grid,
        {**arguments, **result, "spans": spans},
        shape.group_constants | {"BLOCK_S": block_s} | constants,
        warps,
    )
    kinds = 3 if input_sum else 2
    fold = Launch(
        _backward.fold_spans,
        (kinds * shape.batch, -(-shape.channels // 64)),
        {"workspace": workspace, "sums": sums, "spans": spans, "channels": shape.channels},
        {"BLOCK_S": block_s, "BLOCK_C": 64},
    )
    return [first, second, fold]


def launches_parameter_gradients(
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    vectors: Tensor,
    dscale: Tensor | None,
) -> list[Launch]:
    """From sums (3, B, C) to vectors (3, C) and dscale (B, C), one launch."""
    _, batch, channels = sums.shape
    block = 32
    return [
        Launch(
            _backward.parameter_gradients,
            (-(-channels // block),),
            {
                "sums": sums,
                "weight": weight,
                "bias": bias,
                "scale": scale,
                "scale_row": _row(scale),
                "vectors": vectors,
                "dscale": dscale,
                "batch": batch,
                "channels": channels,
                "plane": batch * channels,
            },
            {"BLOCK_B": min(32, power_of_two(max(batch, 1))), "BLOCK_C": block},
        )
    ]

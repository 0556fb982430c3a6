"""A `Program` run in Python with torch operations, on any device and in any dtype: the oracle of the C++ executor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .program import Attention, Columns, Convolution, Filter, JoinNorm, Norm, Operation, Program


def run(program: Program, x: Tensor, rows: Tensor) -> Tensor:
    """The network's output.

    Args:
        program: its constants on x's device.
        x: (B, channels, H, W), the program's first buffer, in the dtype of the convolutions' weights.
        rows: (B or 1, width) conditioning, float32 (float64 with x).

    Returns:
        (B, C_out, H, W) in x's dtype.
    """
    values: dict[int, Tensor] = {0: x.contiguous(memory_format=torch.channels_last)}
    for operation, dead in zip(program.operations, program.dead, strict=True):
        _step(operation, program.constants, rows, values, dead)
        for buffer in dead:
            del values[buffer]
    return values[program.output]


def _step(
    operation: Operation, constants: tuple[Tensor, ...], rows: Tensor, values: dict[int, Tensor], dead: tuple[int, ...]
) -> None:
    def columns(c: Columns | None) -> Tensor | None:
        return None if c is None else rows[:, c.start : c.stop]

    def constant(index: int | None) -> Tensor | None:
        return None if index is None else constants[index]

    match operation:
        case Convolution(inputs=inputs, residual=residual):
            skip = None if residual is None else values[residual]
            x = tuple(values[i] for i in inputs)
            weight, bias = constants[operation.weight], constant(operation.bias)
            # buffer 0 can be the caller's memory
            ends = residual in dead and residual not in inputs and residual != 0
            values[operation.output] = _convolution(operation, x, weight, bias, skip, ends)
        case Filter(input=source, residual=residual):
            y = _resample(operation, values[source], constants[operation.filter])
            skip = None if residual is None else values[residual]
            values[operation.output] = _epilogue(y, constant(operation.bias), skip, 1.0, operation.scale)
        case Norm(inputs=inputs):
            values[operation.output] = functional.group_norm_silu(
                values[inputs[0]] if len(inputs) == 1 else (values[inputs[0]], values[inputs[1]]),
                operation.groups,
                constants[operation.weight],
                constants[operation.bias],
                operation.eps,
                emb=columns(operation.emb),
                input_bias=constant(operation.input_bias),
                scale=columns(operation.scale),
                shift=columns(operation.shift),
                activation="silu" if operation.silu else None,
            )
        case JoinNorm():
            values[operation.sum], values[operation.output] = functional.residual_group_norm_silu(
                values[operation.input],
                values[operation.skip],
                constant(operation.join_bias),
                operation.skip_scale,
                operation.groups,
                constants[operation.weight],
                constants[operation.bias],
                operation.eps,
                activation="silu" if operation.silu else None,
            )
        case Attention(input=source):
            values[operation.output] = functional.projected_attention(
                values[source], operation.heads, interleaved=False
            )


def _epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, residual_scale: float, scale: float) -> Tensor:
    """(y + bias + residual·residual_scale)·scale, in y's memory."""
    if bias is not None:
        y.add_(bias.reshape(1, -1, 1, 1))
    if residual is not None:
        y.add_(residual, alpha=residual_scale)
    return y if scale == 1 else y.mul_(scale)


def _convolution(
    operation: Convolution,
    inputs: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    into_residual: bool,
) -> Tensor:
    """`into_residual`: nobody reads the residual later, its memory may be taken."""
    if operation.resampling == "up":
        inputs = tuple(F.interpolate(x, scale_factor=2, mode="nearest") for x in inputs)
    elif operation.resampling == "down":
        inputs = tuple(F.avg_pool2d(x, 2) for x in inputs)
    # a bias in float32 is added to 16 bits in float32
    early, late = (bias, None) if bias is not None and bias.dtype == weight.dtype else (None, bias)
    factor = operation.residual_scale
    if weight.shape[-1] == 1 and operation.padding == 0:
        into = residual if into_residual and not operation.residual_up and early is None else None
        y = _pointwise(inputs, weight.flatten(1), early, into, factor)
        residual = residual if into is None else None
    else:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        y = F.conv2d(x, weight, early, padding=operation.padding)
    if residual is not None and operation.residual_up:
        batch, channels, height, width = residual.shape
        # each pixel of the residual beside the 2×2 that it is added to
        y.view(batch, channels, height, 2, width, 2).add_(residual[:, :, :, None, :, None], alpha=factor)
        residual = None
    return _epilogue(y, late, residual, factor, operation.scale)


def _pointwise(
    inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, into: Tensor | None, factor: float
) -> Tensor:
    """A 1×1 convolution as products of matrices, which need no concatenation; added to into·factor in its memory."""
    batch, _, height, width = inputs[0].shape
    rows = [_pixels(x) for x in inputs]
    weights = weight.split([x.shape[1] for x in inputs], dim=1)
    if into is None:
        y = F.linear(rows[0], weights[0], bias)
        rows, weights, factor = rows[1:], weights[1:], 1.0
    else:
        y = _pixels(into)
    for x, w in zip(rows, weights, strict=True):
        y.addmm_(x, w.t(), beta=factor)
        factor = 1.0
    return y.view(batch, height, width, y.shape[1]).permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last as (B·H·W, C), a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _resample(operation: Filter, x: Tensor, taps: Tensor) -> Tensor:
    weight = taps.expand(x.shape[1], 1, *taps.shape)
    if operation.up:
        return F.conv_transpose2d(x, weight, stride=2, padding=operation.padding, groups=x.shape[1])
    return F.conv2d(x, weight, stride=2, padding=operation.padding, groups=x.shape[1])

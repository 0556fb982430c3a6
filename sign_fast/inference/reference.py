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
        _step(operation, program.constants, rows, values)
        for buffer in dead:
            del values[buffer]
    return values[program.output]


def _step(operation: Operation, constants: tuple[Tensor, ...], rows: Tensor, values: dict[int, Tensor]) -> None:
    def columns(c: Columns | None) -> Tensor | None:
        return None if c is None else rows[:, c.start : c.stop]

    def constant(index: int | None) -> Tensor | None:
        return None if index is None else constants[index]

    match operation:
        case Convolution(inputs=inputs, residual=residual):
            skip = None if residual is None else values[residual]
            values[operation.output] = _convolution(
                operation, tuple(values[i] for i in inputs), constants[operation.weight], constant(operation.bias), skip
            )
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
    operation: Convolution, inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    if operation.resampling == "up":
        inputs = tuple(F.interpolate(x, scale_factor=2, mode="nearest") for x in inputs)
    elif operation.resampling == "down":
        inputs = tuple(F.avg_pool2d(x, 2) for x in inputs)
    if residual is not None and operation.residual_up:
        residual = F.interpolate(residual, scale_factor=2, mode="nearest")
    # a bias in float32 is added to 16 bits in float32
    early, late = (bias, None) if bias is not None and bias.dtype == weight.dtype else (None, bias)
    if weight.shape[-1] == 1 and operation.padding == 0:
        y = _pointwise(inputs, weight.flatten(1), early)
    else:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        y = F.conv2d(x, weight, early, padding=operation.padding)
    return _epilogue(y, late, residual, operation.residual_scale, operation.scale)


def _pointwise(inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution as products of matrices, which need no concatenation."""
    batch, _, height, width = inputs[0].shape
    first, *others = (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in inputs)
    part, *parts = weight.split([x.shape[1] for x in inputs], dim=1)
    y = F.linear(first, part, bias)
    for x, w in zip(others, parts, strict=True):
        y.addmm_(x, w.t())
    return y.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _resample(operation: Filter, x: Tensor, taps: Tensor) -> Tensor:
    weight = taps.to(x.dtype).expand(x.shape[1], 1, *taps.shape)
    if operation.up:
        return F.conv_transpose2d(x, weight, stride=2, padding=operation.padding, groups=x.shape[1])
    return F.conv2d(x, weight, stride=2, padding=operation.padding, groups=x.shape[1])

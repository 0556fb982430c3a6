"""A network as data: a flat list of operations on numbered buffers, which the C++ executor and `reference` run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from torch import Tensor

Resampling: TypeAlias = Literal["none", "up", "down"]


@dataclass(frozen=True)
class Buffer:
    """An activation (B, channels, height, width), channels_last in memory."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Columns:
    """Columns start … stop − 1 of the conditioning rows, (B or 1, width) float32."""

    start: int
    stop: int


@dataclass(frozen=True)
class Convolution:
    """output = (conv(resample(concat(inputs))) + bias + residual·residual_scale)·scale, stride 1.

    Args:
        inputs: one buffer, or two whose channels are concatenated.
        output: buffer.
        weight: constant (C_out, C_in, k, k).
        bias: constant (C_out,), or None; float32, but attention's projection has it in the weight's dtype.
        padding: zeros on each side of the resampled input.
        resampling: of the input, before the convolution: "up" nearest ×2, "down" the mean of 2×2.
        residual: buffer in the output's shape (half of it in height and width with residual_up), or None.
        residual_up: the residual is read as if nearest-upsampled ×2.
        residual_scale, scale: factors of the residual and of the sum. Where a norm can take up the sum, `fuse_joins`
            finds it in `scale`; elsewhere the weight has it in itself, and only residual_scale is not 1.
    """

    inputs: tuple[int, ...]
    output: int
    weight: int
    bias: int | None
    padding: int
    resampling: Resampling = "none"
    residual: int | None = None
    residual_up: bool = False
    residual_scale: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Filter:
    """Depthwise resampling by 2: output = (resample(input) + bias + residual)·scale.

    Args:
        input, output: buffers.
        filter: constant (t, t), applied to every channel; with `up` transposed, gain 4 included in it.
        up: transposed convolution of stride 2, else convolution of stride 2.
        padding: of that convolution.
        bias, residual, scale: as in `Convolution`.
    """

    input: int
    output: int
    filter: int
    up: bool
    padding: int
    bias: int | None = None
    residual: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Norm:
    """output = silu(norm(concat(inputs) + emb + input_bias)·(1 + scale) + shift), see `functional.group_norm_silu`.

    Args:
        inputs: one buffer, or two whose channels are concatenated.
        output: buffer.
        groups, eps: of the norm.
        weight, bias, input_bias: constants (C,); input_bias may be None.
        emb, scale, shift: columns of the conditioning rows, or None.
        silu: whether the activation follows.
    """

    inputs: tuple[int, ...]
    output: int
    groups: int
    eps: float
    weight: int
    bias: int
    input_bias: int | None = None
    emb: Columns | None = None
    scale: Columns | None = None
    shift: Columns | None = None
    silu: bool = True


@dataclass(frozen=True)
class JoinNorm:
    """sum = (input + skip + join_bias)·skip_scale; output = silu(norm(sum)), see `residual_group_norm_silu`.

    What `fuse_joins` makes of a convolution with a residual and the norm after it, where the convolution is a library's
    and has no such epilogue.
    """

    input: int
    skip: int
    sum: int
    output: int
    skip_scale: float
    join_bias: int | None
    groups: int
    eps: float
    weight: int
    bias: int
    silu: bool = True


@dataclass(frozen=True)
class Attention:
    """output (B, C, H, W) = softmax(qᵀk/√d)·v of the input (B, 3·C, H, W) whose channels are all q, all k, all v."""

    input: int
    output: int
    heads: int


Operation: TypeAlias = Convolution | Filter | Norm | JoinNorm | Attention


def reads(operation: Operation) -> tuple[int, ...]:
    """The buffers that an operation reads."""
    match operation:
        case Convolution(inputs=inputs, residual=residual):
            return inputs if residual is None else (*inputs, residual)
        case Filter(input=source, residual=residual):
            return (source,) if residual is None else (source, residual)
        case Norm(inputs=inputs):
            return inputs
        case JoinNorm(input=source, skip=skip):
            return source, skip
        case Attention(input=source):
            return (source,)


def writes(operation: Operation) -> tuple[int, ...]:
    """The buffers that an operation writes."""
    return (operation.sum, operation.output) if isinstance(operation, JoinNorm) else (operation.output,)


@dataclass(frozen=True, eq=False)
class Program:
    """Operations in order, what they read and write, and the constants.

    Args:
        operations: each reads buffers that were written before it; buffer 0 is the network's input.
        buffers: shapes; each is written by one operation.
        constants: as the operations index them; weights and filters in the network's dtype, norms and biases float32.
        output: the buffer that is the network's output.
        width: columns of the conditioning rows.
    """

    operations: tuple[Operation, ...]
    buffers: tuple[Buffer, ...]
    constants: tuple[Tensor, ...]
    output: int
    width: int

    @cached_property
    def dead(self) -> tuple[tuple[int, ...], ...]:
        """For each operation the buffers that nothing reads after it; a sum that nothing reads is one at once."""
        last: dict[int, int] = {}
        for i, operation in enumerate(self.operations):
            last |= dict.fromkeys((*writes(operation), *reads(operation)), i)
        del last[self.output]
        groups: list[list[int]] = [[] for _ in self.operations]
        for buffer, i in last.items():
            groups[i].append(buffer)
        return tuple(tuple(group) for group in groups)

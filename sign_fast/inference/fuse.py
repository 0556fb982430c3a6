"""What a program becomes where convolutions are a library's, which cannot add a residual on their way out."""

from __future__ import annotations

from dataclasses import replace

from .program import Convolution, Filter, JoinNorm, Norm, Operation, Program


def fuse_joins(program: Program) -> Program:
    """The program with each residual join done by the norm that follows it, where convolutions are a library's.

    A convolution (or filter) with a residual whose output goes next into a norm of its own becomes the bare
    convolution and a `JoinNorm`, which adds bias and residual on the way.
    """
    operations: list[Operation] = []
    buffers = list(program.buffers)
    for operation in program.operations:
        last = operations[-1] if operations else None
        if (
            isinstance(operation, Norm)
            and isinstance(last, Convolution | Filter)
            and last.residual is not None
            and not (isinstance(last, Convolution) and (last.residual_up or last.residual_scale != 1))
            and operation.inputs == (last.output,)
            and (operation.emb, operation.scale, operation.shift, operation.input_bias) == (None,) * 4
        ):
            bare = len(buffers)
            buffers.append(buffers[last.output])
            operations[-1] = replace(last, output=bare, bias=None, residual=None, scale=1.0)
            operation = JoinNorm(
                input=bare,
                skip=last.residual,
                sum=last.output,
                output=operation.output,
                skip_scale=last.scale,
                join_bias=last.bias,
                groups=operation.groups,
                eps=operation.eps,
                weight=operation.weight,
                bias=operation.bias,
                silu=operation.silu,
            )
        operations.append(operation)
    return replace(program, operations=tuple(operations), buffers=tuple(buffers))

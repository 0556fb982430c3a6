"""Which gradients a backward pass leads to: fewer than `needs_input_grad` where it was asked for some inputs only."""

from __future__ import annotations

from typing import Any

import torch


def needed(ctx: Any) -> tuple[bool, ...]:
    """`ctx.needs_input_grad` without the inputs whose gradients this pass has no use for.

    `torch.autograd.grad(y, x)` and `backward(inputs=[x])` run through a network to x alone. The engine leaves out what
    it can; an autograd.Function is told only what required a gradient when it ran forward, and would make those of its
    weights to throw them away.

    Args:
        ctx: of an autograd.Function, in its backward.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return needs
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return tuple(need and _runs(next(nodes)) for need in needs)


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined,no-any-return]
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True

"""First derivatives that can be differentiated again: through plain torch, since the kernels' are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_backward(
    function: Callable[..., Any], arguments: Sequence[Any], needs: Sequence[bool], *upstream: Tensor | None
) -> tuple[Any, ...]:
    """The gradients of `function` for the arguments that need one, as a graph (create_graph=True); None for others.

    upstream: one gradient for each output of the function, None where nothing was made of it.
    """
    # views: partial derivatives, without those through an argument that itself depends on another one
    aliases = [t.view_as(t) if need else t for t, need in zip(arguments, needs, strict=True)]
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
    if not wanted:
        return (None,) * len(aliases)
    outputs = function(*aliases)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    given = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y is not None and g is not None]
    found = iter(
        torch.autograd.grad([y for y, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if need else None for need in needs)

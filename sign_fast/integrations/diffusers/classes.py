"""Giving a module another class, and its forward to whatever has kept it."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

# where accelerate's and diffusers' hooks keep the forward that they call
_NAMES = ("forward", "_old_forward", "original_forward")


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Set the class; hooks that have kept its bound forward go on with the new one's."""
    kept = bound_forwards(module, type(module))
    module.__class__ = kind
    for holder, name in kept:
        holder[name] = MethodType(kind.forward, module)


def bound_forwards(module: nn.Module, kind: type[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Where the instance's attributes and diffusers' hooks hold `kind.forward` bound to the module."""
    holders = [module.__dict__]
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
    holders += [vars(hook.fn_ref) for hook in hooks.values() if hasattr(hook, "fn_ref")]
    found = []
    for holder in holders:
        for name in _NAMES:
            bound = holder.get(name)
            if isinstance(bound, MethodType) and bound.__self__ is module and bound.__func__ is kind.forward:
                found.append((holder, name))
    return found

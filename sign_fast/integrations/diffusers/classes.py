"""Giving a module another class and back, its forward to whatever has kept it, and who else watches that forward."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

# where accelerate's and diffusers' hooks keep the forward that they call
_NAMES = ("forward", "_old_forward", "original_forward")


def is_ours(kind: type) -> bool:
    return kind.__module__.startswith(f"{__package__}.")


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or had before it became one of ours."""
    kind = type(module)
    return next(base for base in kind.__mro__ if not is_ours(base))


def derived_since(module: nn.Module) -> bool:
    """Whether something else (a parametrization, FSDP) has made it a class of its own out of ours."""
    return not is_ours(type(module)) and any(map(is_ours, type(module).__mro__))


def sharded(module: nn.Module) -> bool:
    """Whether FSDP owns parameters in it, also while they are gathered and look like any other."""
    names = ("FSDPModule", "FullyShardedDataParallel")  # not imported: that takes a while
    return any(base.__name__ in names for m in module.modules() for base in type(m).__mro__)


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


def untouched(module: nn.Module) -> bool:
    """Whether calling the module is no more than its class's forward: its parameters may be used without calling it."""
    return "forward" not in module.__dict__ and not _hooked(module)


def unwatched(module: nn.Module) -> bool:
    """Whether calling the module ends in its class's forward and nobody else sees or changes what that takes and gives.

    Offloading, which moves parameters around the forward, does neither.
    """
    overridden = "forward" in module.__dict__ and not bound_forwards(module, type(module))
    return not overridden and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

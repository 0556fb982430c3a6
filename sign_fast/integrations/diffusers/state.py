"""What a network's forward reads in Python, besides its tensors: a captured generation does not see it change."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn

_FLAGS = ("use_slicing", "use_tiling", "tile_latent_min_size", "tile_overlap_factor", "training")
_FREE_U = ("s1", "s2", "b1", "b2")
_TOLD = frozenset(("processor", "_disable_adapters", "resolution_idx", "use_slicing"))


def python_state(networks: Iterable[nn.Module]) -> Hashable:
    """Equal for equal states: the classes of modules and attention processors, adapters and their scales, FreeU's
    scales, the autoencoder's slicing and tiling. What hooks and processors hold in themselves is not looked at."""
    found: list[Any] = []
    waiting: list[nn.Module | None] = list(networks)
    for module in waiting:  # which grows meanwhile; asked at every call, so written for speed
        if module is None:
            continue
        values = module.__dict__
        found.append(type(module) if values.keys().isdisjoint(_TOLD) else _of(module))
        if children := values["_modules"]:
            waiting.extend(children.values())
    return tuple(found)


def _of(module: nn.Module) -> Hashable:
    values: dict[str, Any] = module.__dict__
    found: list[Any] = [type(module)]
    if "processor" in values:
        found.append(type(values["processor"]))
    if "_disable_adapters" in values:  # peft's layers
        active = values.get("_active_adapter", ())
        found += [
            values["_disable_adapters"],
            active if isinstance(active, str) else tuple(active),
            tuple(values.get("scaling", {}).items()),
            tuple(values.get("merged_adapters", ())),
        ]
    if "resolution_idx" in values:  # the up blocks
        found.append(tuple(values.get(name) for name in _FREE_U))
    if "use_slicing" in values:  # the autoencoder
        found.append(tuple(values.get(name) for name in _FLAGS))
    return tuple(found)

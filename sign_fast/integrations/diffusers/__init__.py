"""diffusers on sign_fast: `accelerate` and `restore` for its UNets and autoencoders, `SiDPipeline` for few steps.

Needs `pip install 'sign-fast[diffusers]'`; importing this package imports none of it, nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .versions import TESTED_VERSIONS

if TYPE_CHECKING:
    from .acceleration import accelerate, restore
    from .pipeline import SiDPipeline
    from .report import Acceleration, Site

_LAZY = {
    "Acceleration": "report",
    "SiDPipeline": "pipeline",
    "Site": "report",
    "accelerate": "acceleration",
    "restore": "acceleration",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = ["TESTED_VERSIONS", "Acceleration", "SiDPipeline", "Site", "accelerate", "restore"]

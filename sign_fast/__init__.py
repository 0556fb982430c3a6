"""sign_fast: run, and distil, one- and few-step image generators, fast on NVIDIA GPUs and complete on a CPU.

Nothing is compiled, initialised or imported beyond this file until it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {"ImageGenerator": "sign_fast.sampling.generator", "optimize": "sign_fast.inference.optimized"}
_SUBMODULES = {
    "checkpoints",
    "data",
    "distill",
    "editing",
    "functional",
    "inference",
    "kernels",
    "metrics",
    "models",
    "nn",
    "sampling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})

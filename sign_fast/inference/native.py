"""The C++ executor of a `Program`, where the extension has one."""

from __future__ import annotations

from typing import Any

import torch

from .. import functional  # noqa: F401  (defines the operators that the ATen executor calls)
from ..kernels import extension
from .program import Program


def native_program(program: Program, device: torch.device, dtype: torch.dtype, consume: bool = False) -> Any | None:
    """The program ready to run in C++ on `device` with activations in `dtype`; None: `reference.run` runs it.

    Args:
        consume: empty each weight's tensor once it is packed, where weights are packed.
    """
    module = extension.module()
    if module is None or dtype == torch.float64 or device.type not in ("cpu", "cuda"):
        return None
    return module.Program(program, packs(device, dtype), dtype, consume)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the program runs on kernels of our own with packed weights; else, where there is one, through ATen."""
    module = extension.module()
    # without AVX2 our kernels are scalar code, and PyTorch's own are faster
    vectors = module is not None and module.capability() != "DEFAULT"
    return vectors and device.type == "cpu" and dtype == torch.float32

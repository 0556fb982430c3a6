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
    native = device.type == "cpu" and dtype == torch.float32
    return module.Program(program, native, dtype, consume)

"""Which implementation each operation runs on, here, for `sign-fast info`."""

from __future__ import annotations

import torch

from . import extension


def operations() -> dict[str, str]:
    """{"operation, device": implementation or the reason why the fast one is not there}."""
    missing = extension.missing()
    norm = "C++ without gradients, plain PyTorch with" if missing is None else f"plain PyTorch: {missing}"
    plain = "plain PyTorch: no faster version exists yet"
    table = {
        "group_norm_silu, cpu": norm,
        "attention, cpu": "PyTorch's fused attention",
        "distill_loss, cpu": plain,
        "sampler_step, cpu": plain,
    }
    if torch.cuda.is_available():
        table |= {
            "group_norm_silu, cuda": plain,
            "attention, cuda": "PyTorch's fused attention",
            "distill_loss, cuda": plain,
            "sampler_step, cuda": plain,
        }
    return table

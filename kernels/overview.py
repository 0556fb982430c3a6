"""Which implementation each operation runs on, here, for `sign-fast info`."""

from __future__ import annotations

import torch

from . import device, extension


def operations() -> dict[str, str]:
    """{"operation, device": implementation or the reason why the fast one is not there}, a row for each GPU."""
    missing = extension.missing()
    plain = "" if missing is None else f"plain PyTorch: {missing}"
    table = {
        "group_norm_silu, cpu": plain or "C++",
        "attention, cpu": "PyTorch's flash attention",
        "distill_loss, cpu": plain or "C++",
        "sampler_step, cpu": plain or "C++, gradients in plain PyTorch",
        "combine, cpu": plain or "C++, gradients in plain PyTorch",
        "convolution, cpu": plain or "C++",
    }
    for index in range(torch.cuda.device_count()):
        reason = device.gpu_reason(index)
        slow = "" if reason is None else f"plain PyTorch: {reason}"
        table |= {
            f"group_norm_silu, cuda:{index}": slow or "Triton",
            f"attention, cuda:{index}": slow or "Triton",
            f"distill_loss, cuda:{index}": slow or "Triton",
            f"sampler_step, cuda:{index}": slow or "Triton, gradients in plain PyTorch",
            f"combine, cuda:{index}": slow or "Triton, gradients in plain PyTorch",
        }
    return table

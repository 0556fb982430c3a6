"""The combination as a Triton launch: from tensors, real or on the meta device, to what runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..device import Device
from ..launch import Kernels, Launch
from .config import Call, plan

_kernels = Kernels("combine.triton_kernels")

MOST_STATES = 8


def launches_forward(states: Sequence[Tensor], coefficients: Tensor, y: Tensor, device: Device) -> list[Launch]:
    """y = Σ coefficients[j]·states[j]; states and y dense in one memory format."""
    p = plan(Call(y.numel(), min(t.itemsize for t in (*states, y))), device)
    arguments: dict[str, Tensor | int | None] = {f"x{j}": None for j in range(MOST_STATES)}
    arguments |= {f"x{j}": state for j, state in enumerate(states)}
    arguments |= {"coefficients": coefficients, "y": y, "elements": y.numel()}
    grid = (-(-y.numel() // p.elements),)
    # no fused multiply-adds: the bits are those of plain torch
    return [Launch(_kernels.combine, grid, arguments, {"BLOCK": p.elements}, p.num_warps, enable_fp_fusion=False)]

"""One Triton launch as data: what an operation runs on a GPU, what the code-generation table compiles without one.

An operation turns tensors (real ones, or on the meta device) into `Launch`es; running them, compiling them ahead of
time and counting their bytes all start from the same list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of a @triton.jit function.

    Args:
        kernel: the JIT function.
        grid: up to three numbers of programs.
        arguments: run-time arguments by name: tensors, integers, floats, or None for an absent pointer.
        constants: its tl.constexpr arguments by name.
        num_warps, num_stages, enable_fp_fusion: Triton's launch options; the last one allows fused multiply-adds.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, torch.Tensor | int | float | None]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    enable_fp_fusion: bool = True

    def run(self) -> None:
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=self.enable_fp_fusion,
        )


_noted: ContextVar[list[Launch]] = ContextVar("noted")


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """The launches that the operators' GPU versions, called with meta tensors, would make."""
    launches: list[Launch] = []
    token = _noted.set(launches)
    try:
        yield launches
    finally:
        _noted.reset(token)


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run the launches in order on `device`'s current stream (in the interpreter: on the CPU; on meta: note them)."""
    if device.type == "meta":
        _noted.get().extend(launches)
        return
    if device.type != "cuda":
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):  # Triton launches on the current device, not on its arguments' one
        for launch in launches:
            launch.run()

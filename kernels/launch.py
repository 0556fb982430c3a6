"""One Triton launch as data: what an operation runs on a GPU, what the code-generation table compiles without one.

An operation turns tensors (real ones, or on the meta device) into `Launch`es; running them, compiling them ahead of
time and counting their bytes all start from the same list.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


class Kernel:
    """A @triton.jit function of this package by name: machine code that is at hand is launched without Triton.

    Args:
        module: e.g. "attention.triton_kernels".
        name: of the function in it.
    """

    def __init__(self, module: str, name: str) -> None:
        self.name = f"{module}.{name}"
        self.__name__ = name
        self._module = module

    @cached_property
    def function(self) -> Any:
        """The JIT function; its first use imports Triton, which takes as long as the rest of the library."""
        module = importlib.import_module(f"{__package__}.{self._module}")
        return getattr(module, self.__name__)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


class Kernels:
    """The @triton.jit functions of a module of this package, as attributes."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Kernel:
        kernel = Kernel(self._module, name)
        setattr(self, name, kernel)
        return kernel


@dataclass(frozen=True)
class Launch:
    """One launch of a @triton.jit function.

    Args:
        kernel: the JIT function, or its name.
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

    @property
    def function(self) -> Any:
        """The JIT function."""
        return self.kernel.function if isinstance(self.kernel, Kernel) else self.kernel

    @property
    def name(self) -> str:
        """The kernel's, equal in every process: "attention.triton_kernels.forward"."""
        if isinstance(self.kernel, Kernel):
            return self.kernel.name
        return f"{self.kernel.fn.__module__}.{self.kernel.fn.__qualname__}"

    def run(self) -> None:
        """By Triton, compiled at the first call of its kind."""
        self.function[self.grid](
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
    if device.type == "cuda":
        from .packs import dispatch  # which knows launches

        assert device.index is not None
        dispatch.run(launches, device.index)
        return
    for launch in launches:
        launch.run()

"""Each operation at the published networks' shapes: its launches without data, real inputs, plain torch, its bytes.

One list of cases serves the code-generation table, the timings, compute-sanitizer and the graph captures.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sign_fast.kernels.device import Device
from sign_fast.kernels.launch import Launch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BATCHES = (1, 64)
Direction = Literal["forward", "backward"]
Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case(ABC):
    """One operation at one shape.

    Args:
        batch: images.
        dtype: of the activations, a name of `DTYPES`.
    """

    batch: int
    dtype: str
    operation: ClassVar[str]
    activations: ClassVar[frozenset[str]]  # the kernels' arguments as large as an activation
    directions: ClassVar[tuple[Direction, ...]] = ("forward", "backward")

    @property
    @abstractmethod
    def shape(self) -> str:
        """The shape in a word, as the table names it."""

    @abstractmethod
    def launches(self, direction: Direction, device: Device) -> list[Launch]:
        """What runs on `device`, on the meta device: forward as for inference, backward with all it needs of both."""

    @abstractmethod
    def inputs(self, device: str) -> Inputs:
        """Random arguments; those with a gradient require it."""

    @abstractmethod
    def ours(self, inputs: Inputs) -> Outputs:
        """The operation as the library offers it."""

    @abstractmethod
    def eager(self, inputs: Inputs) -> Outputs:
        """The operation as a network written in ordinary torch has it."""

    def expected(self, inputs: Inputs) -> Outputs:
        """What `ours` must agree with: eager's own result, but where that draws random numbers of its own."""
        return self.eager(inputs)

    @abstractmethod
    def bytes(self, direction: Direction) -> int:
        """The fewest bytes to move: each activation read once and written once; backward alone."""

    def flops(self, direction: Direction) -> int:
        """Of the matrix products; backward alone."""
        return 0

    def rivals(self) -> dict[str, Callable[[Inputs], Outputs]]:
        """Further ways to compute it, which the timings stand beside."""
        return {}

    @property
    def wide(self) -> bool:
        """Whether the sizes allow all activation accesses to be 16 bytes wide."""
        return True

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize


OPERATIONS = ("group_norm_silu", "attention", "distill_loss", "sampler_step", "combine")


def cases(
    operation: str, batches: Sequence[int] = BATCHES, dtypes: Sequence[str] = tuple(DTYPES), *, every: bool = False
) -> list[Case]:
    """The operation's cases; `every` adds what no published network does: latent diffusion's shapes, all the folds."""
    found: list[Case] = importlib.import_module(f"{__name__}.{operation}").cases(batches, dtypes, every)
    return found


def small_cases(operation: str) -> list[Case]:
    """One or a few small shapes that reach all the operation's kernels, for compute-sanitizer and captures."""
    found: list[Case] = importlib.import_module(f"{__name__}.{operation}").small_cases()
    return found


def cpu_cases(operation: str) -> list[Case]:
    """What the C++ versions are timed at: CIFAR's shapes, batch 16."""
    found: list[Case] = importlib.import_module(f"{__name__}.{operation}").cpu_cases()
    return found

"""What a launch configuration may know of a GPU, and whether Triton's kernels run on a tensor."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .dispatch import Reason


@dataclass(frozen=True)
class Device:
    """The figures of a GPU that launch configurations are computed from.

    Args:
        name: as the driver gives it; keys the tuned tables.
        capability: compute capability, (9, 0) for Hopper.
        multiprocessors: number of SMs.
        l2_bytes: size of the second-level cache.
        shared_bytes: shared memory that one program may have at most.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int

    @property
    def architecture(self) -> int:
        return self.capability[0] * 10 + self.capability[1]


# One GPU of each architecture that kernels are compiled for where there is none: vendor's data sheets
KNOWN = {
    80: Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20, 163 << 10),
    89: Device("NVIDIA L40S", (8, 9), 142, 96 << 20, 99 << 10),
    90: Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 227 << 10),
    100: Device("NVIDIA B200", (10, 0), 148, 126 << 20, 227 << 10),
    120: Device("NVIDIA GeForce RTX 5090", (12, 0), 170, 96 << 20, 99 << 10),
}


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1, read as Triton reads it)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    shared = p.shared_memory_per_multiprocessor - 1024  # the driver keeps 1 KB of each program's
    return Device(p.name, (p.major, p.minor), p.multi_processor_count, p.L2_cache_size, shared)


def figures(index: int) -> Device:
    """Of a GPU of this process."""
    return _cuda_device(index)


_assumed: ContextVar[Device] = ContextVar("assumed", default=KNOWN[90])


@contextmanager
def assuming(device: Device) -> Iterator[None]:
    """The GPU that tensors on the meta device are taken to be on."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_of(x: Tensor) -> Device:
    """The GPU that x lives on; on the CPU and on the meta device an H100, or `assuming`'s."""
    return _cuda_device(x.device.index) if x.is_cuda else _assumed.get()


_NOT_A_GPU = Reason("Triton kernels run on NVIDIA GPUs")


@lru_cache
def _gpu_reason(index: int) -> Reason | None:
    if torch.version.hip is not None:
        return _NOT_A_GPU
    if _cuda_device(index).capability < (8, 0):
        major, minor = _cuda_device(index).capability
        return Reason(f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}")
    if importlib.util.find_spec("triton") is None:
        from .packs import dispatch

        if not dispatch.serves(index):
            return Reason("Triton is not installed, and no pack of machine code fits", "pip install triton")
    return None


def gpu_reason(index: int) -> Reason | None:
    """None when Triton's kernels run on that GPU, otherwise why not."""
    return _gpu_reason(index)


# torch.compile calls it while tracing instead of tracing into find_spec, at which it would break the graph; this is
# what torch.compiler.assume_constant_result sets, which would import the compiler along with sign_fast
gpu_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supports_triton(x: Tensor) -> Reason | None:
    """None when Triton's kernels can take x, otherwise why not; on the meta device the operators give the shapes."""
    if x.is_cuda:
        return gpu_reason(x.device.index)
    if x.is_meta:
        return None
    return None if interpreting() and x.is_cpu else _NOT_A_GPU

"""How close to what the machine can do? The network's work over the machine's measured ceilings.

Work of one network evaluation, counted on the meta device while the plain network runs there:
FLOPs   two for each multiplication and its addition, of convolutions, linear layers and attention.
bytes   least traffic when each operation that the library fuses reads its inputs once and writes its output once:
        every weight once a batch; a convolution its input (before resampling) and output, bias, residual and scale
        included, the residual being read; a group norm with embedding and SiLU its input and output; attention its q, k
        and v and its result. Concatenations are read in place; the embedding network counts with its weights only.

Ceilings, measured in the same run: the best rate of large matrix products in the dtype, on a CPU of a 3×3 convolution
too (some CPUs' matrix library does not reach what their convolutions do), and the best bandwidth of a large copy or
triad, on a CPU with the benchmark's threads.

attainable time = max(FLOPs / rate, bytes / bandwidth), and the fraction of the roofline is that over the measured time.
It can pass 1: Winograd convolutions multiply less than is counted here, and what fits a cache need not travel.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain

_SECONDS = 0.2  # for one size of matrix, one form of copy
_CPU_SIZES = (256, 512, 1024, 2048)
_CPU_IMAGES = 16  # of the convolution
_CPU_ELEMENTS = 1 << 25  # 128 MiB an array: more than a cache holds
_CUDA_SIZES = (4096, 8192, 16384)


@dataclass(frozen=True)
class Work:
    """Of one network evaluation.

    Args:
        flops: an image.
        activations: elements read and written, an image.
        weights: elements read, a batch.
        itemsize: bytes of an element.
    """

    flops: float
    activations: int
    weights: int
    itemsize: int

    def bytes(self, batch: int) -> int:
        """Least traffic of a batch."""
        return (self.weights + batch * self.activations) * self.itemsize


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: FLOP/s of a matrix product, bytes/s of a copy."""

    flop_s: float
    byte_s: float

    def __str__(self) -> str:
        return f"ceilings: matrix product {self.flop_s / 1e12:.3g} TFLOP/s, copy {self.byte_s / 1e9:.3g} GB/s"

    def attainable(self, work: Work, batch: int) -> float:
        """Seconds that one evaluation of a batch takes at least."""
        return max(batch * work.flops / self.flop_s, work.bytes(batch) / self.byte_s)

    def columns(self, work: Work, batch: int, calls: int, ms_per_image: float) -> dict[str, float]:
        """The fraction of the roofline of a generation with so many network calls, and what it was computed from."""
        return {
            "gflop_per_call": batch * work.flops / 1e9,
            "mb_per_call": work.bytes(batch) / 1e6,
            "matrix_tflop_s": self.flop_s / 1e12,
            "copy_gb_s": self.byte_s / 1e9,
            "roofline": calls * self.attainable(work, batch) / (ms_per_image / 1000 * batch),
        }


def count(net: Any, dtype: torch.dtype) -> Work:
    """The work of a network of `sign_fast.models`, which is not changed."""
    net = copy.deepcopy(net).to("meta")
    moved = 0

    def counting(function: Callable[..., Tensor], elements: Callable[[Any, Tensor, Tensor], int]) -> Any:
        def call(layer: Any, x: Tensor, *more: Any) -> Tensor:
            nonlocal moved
            y = function(layer, x, *more)
            moved += elements(layer, x, y)
            return y

        return call

    with (
        torch.no_grad(),
        patch.object(plain, "conv", counting(plain.conv, lambda layer, x, y: x.numel() + y.numel())),
        patch.object(plain, "norm", counting(plain.norm, lambda layer, x, y: x.numel() + y.numel())),
        patch.object(plain, "attend", counting(plain.attend, lambda layer, x, y: 4 * x.numel())),
        patch.object(
            plain, "block", counting(plain.block, lambda layer, x, y: (1 + bool(layer.num_heads)) * y.numel())
        ),
        FlopCounterMode(display=False) as counter,
    ):
        x = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
        plain.Plain(net, dtype)(x, torch.ones(1, device="meta"))
    weights = sum(p.numel() for p in net.parameters())
    return Work(counter.get_total_flops(), moved, weights, dtype.itemsize)


def _best(function: Callable[[], object]) -> float:
    """The shortest of the runs, in seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SECONDS:
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
        if times[-1] > 5 * _SECONDS:  # a dtype that this processor only emulates
            break
    return min(times)


def _cpu_ceilings(dtype: torch.dtype) -> Ceilings:
    rates = []
    for size in _CPU_SIZES:
        a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
        seconds = _best(lambda a=a, b=b: torch.mm(a, b))
        rates.append(2 * size**3 / seconds)
        if seconds > _SECONDS:
            break
    x = torch.randn(_CPU_IMAGES, 256, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    convolution = _best(lambda: torch.nn.functional.conv2d(x, weight, padding=1))
    rates.append(2 * weight.numel() * x.numel() / 256 / convolution)
    a, b, c = (torch.ones(_CPU_ELEMENTS) for _ in range(3))
    copied = 2 * a.nbytes / _best(lambda: a.copy_(b))
    triad = 3 * a.nbytes / _best(lambda: torch.add(b, c, alpha=3, out=a))
    return Ceilings(max(rates), max(copied, triad))


def _cuda_ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    from benchmarks.kernel_timing import Gpu

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # float32 as the convolutions take it
    try:
        with torch.cuda.device(device):
            gpu = Gpu()
            return Ceilings(max(gpu.matrix_rate(dtype, size) for size in _CUDA_SIZES), gpu.copy_rate())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@functools.cache
def measure(device: str, dtype: torch.dtype) -> Ceilings:
    """This machine's ceilings, measured once a run: seconds on a CPU, less on a GPU."""
    return _cuda_ceilings(dtype, device) if device.startswith("cuda") else _cpu_ceilings(dtype)

"""Capture into CUDA graphs that share one memory pool a device, and whose turns on the device never overlap."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """A captured function: `replay` runs it again and writes `output` anew."""

    output: Tensor

    def replay(self) -> None:
        """Launch it on the current stream."""

    def reset(self) -> None:
        """Wait until it no longer runs, then give up its memory."""


class Capture(Protocol):
    """What `Graphs` needs of a device. All but `capturing` and `reserved` are called within a `turn`."""

    def turn(self) -> AbstractContextManager[None]:
        """Graphs of the device, and what they read and write, belong to the caller's current stream meanwhile."""

    def aside(self) -> AbstractContextManager[None]:
        """The side stream is the current one: for what lives as long as a graph, for warm-up and for capture."""

    def record(self, function: Callable[[], Tensor]) -> Recording:
        """Capture `function`, on the side stream. What the attempt took is given up where it raises."""

    def release(self) -> None:
        """Hand unused memory back to the device."""

    def capturing(self) -> bool:
        """Whether the caller is inside a capture of its own."""

    def reserved(self) -> int:
        """Bytes of the device's pool."""


class _Device:
    """What all graphs of a device share.

    One pool: temporaries of different graphs lie at the same addresses. One side stream: cuBLAS has one workspace a
    stream, which every graph captured on it uses. So two graphs must not run at the same time, on whatever streams:
    `free` is the point from which the next one may, and it is the device that waits for it, not the host. The side
    stream waits for every turn as well: torch's allocator orders memory by the stream that it was allocated on.
    """

    def __init__(self) -> None:
        # reentrant: the garbage collector may end a graph in the middle of another's turn
        self.lock = threading.RLock()
        self.free = torch.cuda.Event()
        self.side = torch.cuda.Stream()
        self.handle: Any = None
        self.recordings: weakref.WeakSet[_CudaRecording] = weakref.WeakSet()
        # torch's allocators may ask a graph whose capture failed whether an allocation is its own, as long as they live
        self.failed: list[torch.cuda.CUDAGraph] = []

    def pool(self) -> Any:
        """The pool to capture into; a pool without graphs is being freed and cannot be shared any more."""
        if self.handle is None or not self.recordings:
            self.handle = torch.cuda.graph_pool_handle()
        return self.handle


_devices: dict[int, _Device] = {}
_devices_lock = threading.Lock()


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor, device: _Device) -> None:
        self.output = output
        self.pool = graph.pool()
        self._graph = graph
        self._device = device
        device.recordings.add(self)

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._device.free.synchronize()
        self._device.recordings.discard(self)
        del self.output
        self._graph.reset()


class CudaCapture:
    """`Capture` with CUDA graphs.

    Args:
        device: a CUDA device; nothing is initialised before the first turn.

    Raises:
        ValueError: not a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs run on a CUDA device, not on {device}")
        self._index = device.index
        self._shared: _Device | None = None

    @property
    def _device(self) -> _Device:
        if self._shared is None:
            with _devices_lock:
                index = torch.cuda.current_device() if self._index is None else self._index
                with torch.cuda.device(index):
                    self._index, self._shared = index, _devices.setdefault(index, _Device())
        return self._shared

    @contextmanager
    def turn(self) -> Iterator[None]:
        device = self._device
        with device.lock, torch.cuda.device(self._index):
            stream = torch.cuda.current_stream()
            stream.wait_event(device.free)
            try:
                yield
            finally:
                device.free.record(stream)
                device.side.wait_event(device.free)

    @contextmanager
    def aside(self) -> Iterator[None]:
        side, stream = self._device.side, torch.cuda.current_stream()
        side.wait_stream(stream)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            stream.wait_stream(side)

    def record(self, function: Callable[[], Tensor]) -> Recording:
        device, graph = self._device, torch.cuda.CUDAGraph()
        pool = device.pool()
        try:
            # thread_local: other threads may allocate and synchronise meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=device.side, capture_error_mode="thread_local"):
                output = function()
        except BaseException:
            self._abandon(graph, pool)
            raise
        return _CudaRecording(graph, output, device)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Give up a capture that failed; a pool that torch's allocator was left allocating to is not used again."""
        try:
            torch._C._cuda_endAllocateToPool(self._index, pool)  # type: ignore[attr-defined]
        except RuntimeError:  # the capture could be ended: the graph has the pool
            graph.reset()
        else:
            torch._C._cuda_releasePool(self._index, pool)  # type: ignore[attr-defined]
            self._device.failed.append(graph)
            self._device.handle = None

    def release(self) -> None:
        torch.cuda.empty_cache()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def reserved(self) -> int:
        if self._shared is None:
            return 0
        with self._shared.lock:
            pools = {recording.pool for recording in self._shared.recordings}
            return sum(segment["total_size"] for pool in pools for segment in torch.cuda.memory_snapshot(pool))

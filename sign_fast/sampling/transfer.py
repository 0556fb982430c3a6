"""Between host and GPU while both go on: pinned buffers, a copy stream, events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from memory that is not pinned the copy would wait for all work before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Transfer:
    """Images on their way to the host; `result` waits for them.

    Args:
        fetch: waits and returns the array; called once.
    """

    def __init__(self, fetch: Callable[[], Array]) -> None:
        self._fetch: Callable[[], Array] | None = fetch
        self._array: Array | None = None
        self._lock = threading.Lock()

    def result(self) -> Array:
        """The images as a NumPy array of their own, the same at every call. Any thread may ask."""
        with self._lock:
            if self._fetch is not None:
                self._array, self._fetch = self._fetch(), None
            assert self._array is not None
            return self._array


@dataclass
class _Slot:
    buffer: Tensor  # flat bytes
    transfer: Transfer


class PinnedRing:
    """Copies tensors to the host through a few pinned buffers, used in turn.

    A copy waits on its own stream for what made the tensor, and nothing waits for the copy but `Transfer.result`. Where
    all buffers are taken, `push` first brings the oldest transfer home, so that pinned memory is bounded while any
    number of transfers may be open.

    Args:
        device: of the tensors.
        slots: number of buffers; two let one batch be copied while the next is generated.
        cuda: torch.cuda, or a stand-in for tests.
        allocate: bytes -> flat pinned uint8 buffer.
    """

    def __init__(
        self,
        device: torch.device,
        slots: int = 2,
        *,
        cuda: Any = torch.cuda,
        allocate: Callable[[int], Any] | None = None,
    ) -> None:
        self._device = device
        self._cuda = cuda
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._stream = cuda.Stream(device)
        self._slots: list[_Slot | None] = [None] * slots
        self._next = 0
        self._lock = threading.Lock()

    def push(self, images: Tensor) -> Transfer:
        """Begin to copy a tensor that the current stream makes; returns at once while a buffer is free.

        Args:
            images: any shape and dtype; not written to until the transfer is done.
        """
        images = images.contiguous()
        with self._lock:
            size = images.numel() * images.element_size()
            target = self._free_buffer(size)[:size].view(images.dtype).view(images.shape)
            self._stream.wait_stream(self._cuda.current_stream(self._device))
            with self._cuda.stream(self._stream):
                target.copy_(images, non_blocking=True)
                copied = self._cuda.Event()
                copied.record(self._stream)
            images.record_stream(self._stream)  # its memory is not given away before the copy has read it
            transfer = Transfer(lambda: _taken_out(target, copied))
            slot = self._slots[self._next]
            assert slot is not None
            slot.transfer = transfer
            self._next = (self._next + 1) % len(self._slots)
            return transfer

    def _free_buffer(self, size: int) -> Any:
        """The next slot's buffer, grown where it is too small, once what it holds has been taken out."""
        slot = self._slots[self._next]
        if slot is not None:
            slot.transfer.result()
        if slot is None or slot.buffer.numel() < size:
            slot = _Slot(self._allocate(size), Transfer(lambda: np.empty(0)))
            self._slots[self._next] = slot
        return slot.buffer


def _taken_out(target: Tensor, copied: Any) -> Array:
    copied.synchronize()
    return target.numpy().copy()  # the buffer is used again


def begin_transfer(images: Tensor, ring: PinnedRing | None) -> Transfer:
    """Through the ring, or, without one, of a tensor that is on the host already."""
    if ring is not None:
        return ring.push(images)
    array = images.numpy()
    return Transfer(lambda: array)

"""Fake tensors of a GPU where there is none, for tests of what a compiler traces there."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sign_fast.kernels import device

_CUDA, _META = 1, 14  # c10::DeviceType


@contextlib.contextmanager
def _indexing() -> Iterator[None]:
    """Let a CPU build of torch index fake CUDA tensors: meta's device guard, which does nothing, stands in."""
    if torch.version.cuda is not None:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_CUDA]
    guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


@contextlib.contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode, yet to be entered, in which "cuda:0" is an H100."""
    monkeypatch.setattr(device, "_cuda_device", lambda index: device.KNOWN[90])
    device._gpu_reason.cache_clear()
    try:
        with _indexing():
            yield FakeTensorMode()
    finally:
        device._gpu_reason.cache_clear()

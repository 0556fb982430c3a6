"""Which operator of a function makes the host wait for the GPU, and on which line of Python it is called."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ITS_SIZE_IS_DATA = "its result's size depends on the data"
SYNCHRONISING: dict[str, str] = {
    "aten::_local_scalar_dense": ".item(), or the truth value of a tensor",
    "aten::_linalg_check_errors": "it checks the result on the host",
    "aten::_unique": _ITS_SIZE_IS_DATA,
    "aten::_unique2": _ITS_SIZE_IS_DATA,
    "aten::bincount": _ITS_SIZE_IS_DATA,
    "aten::equal": "torch.equal gives a Python bool",
    "aten::is_nonzero": "the truth value of a tensor",
    "aten::masked_select": _ITS_SIZE_IS_DATA,
    "aten::nonzero": _ITS_SIZE_IS_DATA,
    "aten::unique_consecutive": _ITS_SIZE_IS_DATA,
    "aten::unique_dim": _ITS_SIZE_IS_DATA,
    "aten::unique_dim_consecutive": _ITS_SIZE_IS_DATA,
}
"""Operators that always wait for the GPU, and why. `_sometimes` knows those that do so for some arguments."""

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Synchronisation:
    """An operator, e.g. "aten::nonzero", why it waits ("" where that is not known), FILE:LINE of its caller."""

    operator: str
    why: str
    where: str

    def __str__(self) -> str:
        if not self.why:
            return f"{self.operator} is not allowed in a CUDA graph, called at {self.where}"
        return f"{self.operator} ({self.why}) synchronises at {self.where}"


def find_synchronising(function: Callable[[], Any], run: Callable[[Callable[[], Any]], Any]) -> Synchronisation | None:
    """The first operator of a function that synchronises, or None.

    Args:
        function: what is looked into.
        run: runs the function that it is given, in a capture for instance; a RuntimeError of it says no more here.

    Returns:
        The operator that raised an error, as every synchronising one does in a capture, or the function of torch that
        did; where none did, the first one that is known to synchronise. `torch.cuda.set_sync_debug_mode` would find
        them too, but in the whole process: it would raise in threads that may well synchronise.
    """
    watch = _Watch()

    def watched() -> Any:
        try:
            with watch:
                return function()
        except RuntimeError as error:
            watch.failed = watch.failed or _raised(error.__traceback__)
            raise

    with contextlib.suppress(RuntimeError):
        run(watched)
    return watch.failed or watch.known


class _Watch(TorchDispatchMode):
    """Sees every operator; remembers the first that raised, and the first that is known to synchronise."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: Synchronisation | None = None
        self.known: Synchronisation | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        why = SYNCHRONISING.get(name) or _sometimes(name, args, kwargs)
        if why and self.known is None:
            self.known = Synchronisation(name, why, _caller())
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if self.failed is None:
                self.failed = Synchronisation(name, why, _caller())
            raise


def _sometimes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Why this call of an operator synchronises that does not always do so; "" where it does not."""
    if name == "aten::_to_copy":
        target = torch.device(kwargs.get("device") or args[0].device)
        return _copying(args[0].device, target, kwargs.get("non_blocking", False))
    if name == "aten::copy_":
        return _copying(args[1].device, args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return _ITS_SIZE_IS_DATA + ": give output_size"
    if name == "aten::index" and _masks(args[1]):
        return "a boolean index: " + _ITS_SIZE_IS_DATA
    # one value is filled in under the mask, without counting
    if name in ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and _masks(args[1]):
        return "" if args[2].numel() == 1 else "a boolean index: " + _ITS_SIZE_IS_DATA
    return ""


def _copying(source: torch.device, target: torch.device, non_blocking: bool) -> str:
    between = source.type != target.type and "cpu" in (source.type, target.type)
    return f"a copy from {source.type} to {target.type}" if between and not non_blocking else ""


def _masks(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _ours_or_torchs(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith((_TORCH, __file__, "<"))


def _caller() -> str:
    """FILE:LINE of the innermost Python frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _ours_or_torchs(frame):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _raised(traceback: TracebackType | None) -> Synchronisation | None:
    """The function of torch, no operator, that raised an error, e.g. torch.cuda.synchronize; None if none did."""
    found = where = None
    while traceback is not None:
        frame = traceback.tb_frame
        if not _ours_or_torchs(frame):
            where, found = f"{frame.f_code.co_filename}:{traceback.tb_lineno}", None
        elif where and found is None:
            found = Synchronisation(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}", "", where)
        traceback = traceback.tb_next
    return found

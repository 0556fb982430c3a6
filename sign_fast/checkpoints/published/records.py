"""What a snapshot's pickle becomes: inert records, and the fixed list of constructors that make them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

Buffer = memoryview | bytes
MAX_DIMENSIONS = 8


class RefusedError(Exception):
    """What is wrong with the file, without its name; the reader of the file makes a `SignFastError` of it."""


def say(value: object) -> str:
    """A value of the file for a message: short, printable, and never a container, whose repr may not end."""
    if isinstance(value, str):
        return repr(value[:60]) + ("…" if len(value) > 60 else "")
    if value is None or type(value) in (bool, float) or (type(value) is int and value.bit_length() <= 64):
        return repr(value)
    return type(value).__name__


def is_key(value: Any) -> TypeGuard[str | int]:
    """Text or a small number: a deep tuple's hash overflows the stack, and large numbers can be made to collide."""
    return type(value) is str or (type(value) is int and abs(value) < 2**20)


@dataclass(eq=False)
class Record:
    """An object of the file: its class's name and its attributes; `persistent` where the file carried its source."""

    class_name: str
    state: dict[Any, Any] = field(default_factory=dict, repr=False)
    persistent: bool = False
    built: bool = False


@dataclass(eq=False)
class NumpyType:
    """A dtype of NumPy's numbers, e.g. "f8"."""

    code: str


@dataclass(frozen=True)
class StorageType:
    """The element type that a storage names."""

    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(eq=False)
class Storage:
    """`numel` elements; their bytes are found after the pickle that names them."""

    type: StorageType
    numel: int
    data: Buffer | None = field(default=None, repr=False)


@dataclass(eq=False)
class TensorRecord:
    """A view of a storage, inside it and not larger than it; `tensor` copies its values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The values, contiguous, in memory of their own, in the storage's dtype."""
        if self.storage.data is None:
            raise RefusedError("has a tensor without values")
        size = self.storage.type.itemsize
        found = torch.empty(self.shape, dtype=self.storage.type.dtype)
        if found.numel():
            # only what the tensor has is read, however far apart in the storage
            steps = [step * size for step in self.stride]
            there = np.ndarray(self.shape, f"V{size}", self.storage.data, self.offset * size, steps)
            found.reshape(-1).view(torch.uint8).numpy()[:] = np.ascontiguousarray(there).reshape(-1).view(np.uint8)
        return found


@dataclass(frozen=True)
class Constructor:
    """What the file may call by this name; `new` where it names a class, to be made by NEWOBJ."""

    name: str
    make: Callable[..., Any] = field(repr=False)
    new: bool = False


def _no_arguments(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: make()  # anything more is a TypeError


def _set(*items: Any) -> set[Any]:
    """Protocols 2 and 3 make a set of a list."""
    if not items:
        return set()
    if len(items) > 1 or type(items[0]) is not list or not all(map(is_key, items[0])):
        raise RefusedError("has a set of what is neither text nor number")
    return set(items[0])


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RefusedError(f"has {say(value)} where a tensor's sizes are")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorRecord:
    """torch's (storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple or len(rest) > 3:
        raise RefusedError("has a tensor that is none")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise RefusedError("has a tensor of too many dimensions, or without its strides")
    start = _whole(offset)
    sizes, steps = tuple(map(_whole, shape)), tuple(map(_whole, stride))
    count, last = 1, start
    for size, step in zip(sizes, steps, strict=True):
        count *= size
        last += (size - 1) * step if size else 0
    # numbers of Python do not overflow, however large the file's are
    if count and (last >= storage.numel or count > storage.numel):
        raise RefusedError("has a tensor that reaches out of its storage")
    if not count:
        start, steps = 0, (0,) * len(steps)
    return TensorRecord(storage, start, sizes, steps)


def _parameter(data: Any, *rest: Any) -> TensorRecord:
    """torch's (data, requires_grad, hooks[, state])."""
    if not isinstance(data, TensorRecord) or len(rest) > 3:
        raise RefusedError("has a parameter that is no tensor")
    return data


PERSISTENCE_VERSION = 6


def _persistent(meta: Any) -> Record:
    """The record of a persistent class; its source is not kept, let alone run."""
    if not isinstance(meta, dict) or not {"type", "version", "class_name", "state"} <= meta.keys():
        raise RefusedError("has a persistent-class record without type, version, class_name and state")
    if meta["type"] != "class" or type(meta["version"]) is not int or meta["version"] != PERSISTENCE_VERSION:
        raise RefusedError(
            f"has a persistent-class record of type {say(meta['type'])}, version {say(meta['version'])}: only 'class', "
            f"version {PERSISTENCE_VERSION}, is known"
        )
    name, state = meta["class_name"], meta["state"]
    if not isinstance(name, str) or not isinstance(state, dict):
        raise RefusedError("has a persistent-class record whose class_name is no text or whose state is no table")
    return Record(name, state, persistent=True, built=True)


_NUMPY = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "u1": "<B", "b1": "<?"}


def _numpy_type(code: Any, *rest: Any) -> NumpyType:
    if not isinstance(code, str) or code not in _NUMPY or len(rest) > 2:
        raise RefusedError(f"has numbers of NumPy's type {say(code)}")
    return NumpyType(code)


def _numpy_number(kind: Any, data: Any) -> float | int | bool:
    if not isinstance(kind, NumpyType) or not isinstance(data, (memoryview, bytes)):
        raise RefusedError("has a number of NumPy's that is none")
    layout = _NUMPY[kind.code]
    if len(data) != struct.calcsize(layout):
        raise RefusedError("has a number of NumPy's of a wrong size")
    value: float | int | bool = struct.unpack(layout, data)[0]
    return value


def build(record: Any, state: Any) -> None:
    """Give an object its state, as the opcode BUILD asks.

    Raises:
        RefusedError: it is no object that takes one, or has one.
    """
    if isinstance(record, Record) and not record.built and isinstance(state, dict):
        record.state, record.built = state, True
    elif isinstance(record, NumpyType) and type(state) is tuple and len(state) >= 2 and state[1] in ("<", "|", "="):
        pass  # (version, byte order, …): little-endian is all that is read
    else:
        raise RefusedError(f"sets the state of {say(record)}")


def _table(entries: dict[str, Any]) -> dict[tuple[str, str], Any]:
    table = {}
    for name, entry in entries.items():
        module, _, attribute = name.rpartition(".")
        table[module, attribute] = entry
    return table


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

STORAGE_TABLE = _table(
    {f"{module}.{name}": StorageType(dtype) for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")}
)
"""What a storage's own pickle may name."""


def snapshot_table(load_storage: Callable[..., Any], encode: Callable[..., Any]) -> dict[tuple[str, str], Any]:
    """All that a snapshot may name. What is not here is refused; nothing is ever imported by a name of the file.

    Args:
        load_storage: reads a storage from the bytes of a `torch.save`.
        encode: text of latin-1 -> bytes, as protocol 2 writes them.
    """
    containers = {name: Constructor(name, _no_arguments(dict), new=True) for name in ("EasyDict", "OrderedDict")}
    entries: dict[str, Any] = {
        "torch_utils.persistence._reconstruct_persistent_obj": Constructor("persistent class", _persistent),
        "dnnlib.util.EasyDict": containers["EasyDict"],
        "collections.OrderedDict": containers["OrderedDict"],
        "torch._utils._rebuild_tensor_v2": Constructor("tensor", _tensor),
        "torch._utils._rebuild_parameter": Constructor("parameter", _parameter),
        "torch._utils._rebuild_parameter_with_state": Constructor("parameter", _parameter),
        "torch.storage._load_from_bytes": Constructor("storage", load_storage),
        "_codecs.encode": Constructor("bytes", encode),
    }
    for builtins in ("builtins", "__builtin__"):  # protocol 2 has the names of Python 2
        entries[f"{builtins}.set"] = Constructor("set", _set)
        entries[f"{builtins}.frozenset"] = Constructor("set", lambda *items: frozenset(_set(*items)))
        entries[f"{builtins}.bytes"] = Constructor("bytes", _no_arguments(bytes))
    for numpy in ("numpy.core", "numpy._core"):
        entries[f"{numpy}.multiarray.scalar"] = Constructor("NumPy's number", _numpy_number)
    entries["numpy.dtype"] = Constructor("NumPy's type", _numpy_type)
    for name in ("ModuleDict", "ModuleList", "Sequential"):
        entries[f"torch.nn.modules.container.{name}"] = Constructor(name, _module(name), new=True)
    return {**_table(entries), **STORAGE_TABLE}


def _module(name: str) -> Callable[[], Record]:
    return lambda: Record(name)

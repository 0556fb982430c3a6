"""How many bytes a Triton kernel reads and writes, counted lane by lane in the interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


class Traffic:
    """Bytes moved by the lanes that no mask switches off; lanes of one access that share an address count once."""

    def __init__(self) -> None:
        self.reads: list[tuple[np.ndarray, int]] = []  # addresses of one access, bytes a lane
        self.writes: list[tuple[np.ndarray, int]] = []

    @property
    def read(self) -> int:
        return sum(addresses.size * size for addresses, size in self.reads)

    @property
    def written(self) -> int:
        return sum(addresses.size * size for addresses, size in self.writes)

    def read_from(self, *tensors: Tensor) -> int:
        """Bytes read from these tensors' storages."""
        return sum(_inside(self.reads, t) for t in tensors)

    def written_to(self, *tensors: Tensor) -> int:
        """Bytes written to these tensors' storages."""
        return sum(_inside(self.writes, t) for t in tensors)


def _inside(accesses: list[tuple[np.ndarray, int]], t: Tensor) -> int:
    storage = t.untyped_storage()
    first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return sum(int(np.count_nonzero((a >= first) & (a < end))) * size for a, size in accesses)


def _lanes(pointers: Any, mask: Any = None) -> tuple[np.ndarray, int]:
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses, on = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
    lanes = addresses[on]
    if lanes.size > 1 and not (lanes[1:] > lanes[:-1]).all():
        lanes = np.unique(lanes)
    return lanes, size


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count what interpreted kernels move inside the block."""
    traffic = Traffic()
    builder = InterpreterBuilder
    # all ways to memory end in these four: unmasked accesses and tensor descriptors as well
    load, store = builder.create_masked_load, builder.create_masked_store
    modify, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def counted_load(self: Any, ptrs: Any, mask: Any, *more: Any, **named: Any) -> Any:
        traffic.reads.append(_lanes(ptrs, mask))
        return load(self, ptrs, mask, *more, **named)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *more: Any, **named: Any) -> Any:
        traffic.writes.append(_lanes(ptrs, mask))
        return store(self, ptrs, value, mask, *more, **named)

    def counted_modify(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *more: Any) -> Any:
        traffic.reads.append(_lanes(ptr, mask))
        traffic.writes.append(_lanes(ptr, mask))
        return modify(self, operation, ptr, value, mask, *more)

    def counted_exchange(self: Any, ptr: Any, *more: Any) -> Any:
        traffic.reads.append(_lanes(ptr))
        traffic.writes.append(_lanes(ptr))
        return exchange(self, ptr, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(builder, "create_atomic_rmw", counted_modify)
        patch.setattr(builder, "create_atomic_cas", counted_exchange)
        yield traffic

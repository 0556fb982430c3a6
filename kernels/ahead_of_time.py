"""Machine code of a `Launch` for any architecture, on a machine that needs no GPU.

A Triton kernel is compiled anew for each combination of argument types, of arguments that are 1 or multiples of 16,
and of constants. `specialise` reads that combination from a launch as Triton's own just-in-time compiler does, so that
what is compiled here is what would be compiled at the first call; the launch's tensors may be on the meta device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch

ARCHITECTURES = (80, 89, 90, 100, 120)

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.bool: "*u1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_DIVISIBLE = [["tt.divisibility", 16]]


class Specialisation(NamedTuple):
    """What of a launch's arguments goes into the compiled code, in the form that `triton.compile` takes.

    signature: type of each parameter by name, in the kernel's order; "constexpr" where the value is in `constants`.
    constants: value by the parameter's place.
    attributes: divisibility by 16, by the parameter's place.
    """

    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list[list[Any]]]


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code for one architecture and what a launch of it needs.

    Args:
        name: the entry's name in `cubin`.
        architecture: 90 for compute capability 9.0.
        num_warps, shared_bytes: of the launch; all shared memory is requested at launch.
        parameters: the names of the arguments that the machine code takes, in order.
        ptx, cubin: the assembly text and the machine code.
        metadata: all that Triton says of the kernel.
    """

    name: str
    architecture: int
    num_warps: int
    shared_bytes: int
    parameters: tuple[str, ...]
    ptx: str
    cubin: bytes
    metadata: Mapping[str, Any]


def _aligned(t: Tensor) -> bool:
    # on the meta device there is no address: allocations begin at multiples of 16, so the offset decides
    return bool((t.storage_offset() * t.element_size() if t.is_meta else t.data_ptr()) % 16 == 0)


def _argument(value: Any, parameter: Any) -> tuple[str, bool]:
    """Triton's type of an argument, "constexpr" where its value is compiled in; whether it is known to divide by 16."""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    kind, divisible = _type(value)
    if annotated := parameter.annotation_type:
        kind, divisible = annotated, divisible and annotated != "u1" and annotated[:2] not in ("fp", "bf")
    elif isinstance(value, int) and value == 1 and kind != "u1" and not parameter.do_not_specialize:
        kind = "constexpr"
    return kind, divisible and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def _type(value: Any) -> tuple[str, bool]:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], _aligned(value)
    if isinstance(value, bool):  # before int: a bool is one
        return "u1", False
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return kind, value % 16 == 0
    raise TypeError(f"a launch takes tensors, numbers and None, not {type(value).__name__}")


def specialise(launch: Launch) -> Specialisation:
    """The specialisation that Triton's just-in-time compiler would choose for this launch."""
    given = {**launch.arguments, **launch.constants}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.function.params):
        value = given.get(parameter.name, parameter.default)
        kind, divisible = _argument(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[place,] = value
        elif divisible:
            attributes[place,] = _DIVISIBLE
    return Specialisation(signature, constants, attributes)


@contextmanager
def _without_line_information() -> Iterator[None]:
    """Source paths stay out of the machine code, so that the same kernel gives the same bytes in every folder."""
    name = "TRITON_DISABLE_LINE_INFO"  # by the environment, which Triton's cache looks at
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def compile(launch: Launch, architecture: int) -> Compiled:
    """Compile the launch's kernel, with its specialisation and options, for an architecture such as 90.

    Triton keeps what it compiled in its own cache (TRITON_CACHE_DIR).

    Raises:
        triton.CompilationError, triton.runtime.errors.PTXASError: the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.function, signature, constants, attributes)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.enable_fp_fusion,
    }
    with _without_line_information():
        done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(
        done.metadata.name,
        architecture,
        done.metadata.num_warps,
        done.metadata.shared,
        tuple(name for name, kind in signature.items() if kind != "constexpr"),
        done.asm["ptx"],
        done.asm["cubin"],
        done.metadata._asdict(),
    )

"""How every operation becomes torch.ops: definition, shapes, implementations, and the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .device import interpreting
from .dispatch import NoKernelError, Reason, fall_back

# the kernels step through memory by the strides that were traced: a compiler may not choose others
TAGS = (torch.Tag.needs_exact_strides,)

on_gpu: dict[str, Callable[..., Any]] = {}
"""Each operator's Triton version by name."""


def _or_plain(name: str, triton: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton version; plain torch where a pack lacks a kernel and Triton is not installed to compile it."""

    def on_cuda(*arguments: Any) -> Any:
        try:
            return triton(*arguments)
        except NoKernelError as missing:
            fall_back(name, Reason(str(missing), "pip install triton"))
            return plain(*arguments)

    return on_cuda


def register(
    library: torch.library.Library,
    implementations: Mapping[str, tuple[Any, Any, Any]],
    cpu: str = "CompositeExplicitAutograd",
    plain: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Implement the defined operators: {name: (shapes, Triton, CPU)}.

    cpu is the third one's dispatch key; as it stands it is plain torch, whose place the C++ extension takes on the CPU.
    plain are those for any device, by name, where the third ones are not.

    Returns:
        call(name, *arguments): the operator, or in Triton's interpreter its GPU version on the CPU's tensors.
    """
    for name, (shapes, triton, on_cpu) in implementations.items():
        torch.library.register_fake(f"sign_fast::{name}", shapes, lib=library)
        library.impl(name, _or_plain(name, triton, (plain or {}).get(name, on_cpu)), "CUDA")
        on_gpu[name] = triton
        library.impl(name, on_cpu, cpu)
    operators = {name: getattr(torch.ops.sign_fast, name).default for name in implementations}

    def call(name: str, *arguments: Any) -> Any:
        first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
        if interpreting() and first.is_cpu and not torch.compiler.is_compiling():
            return implementations[name][1](*arguments)
        return operators[name](*arguments)

    return call

"""The names of compiled kernel variants: a readable text that says all that Triton compiles a kernel anew for.

    group_norm_silu.triton_kernels.forward_tile *bf16:16 None … i32:16 1 fp32 True 64 warps=4 stages=1 fused=1

The kernel, a code for each parameter in its order, the launch's options. A constant's code is its repr; an argument's
is None, 1 (compiled in) or its type, with :16 where it is known to divide by 16. csrc/launcher/specialise.cpp writes
the same text from a launch's values, without Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ahead_of_time import Specialisation, specialise
from ..launch import Launch

_PACKAGE = __name__.removesuffix("packs.key")  # sign_fast.kernels.


def kernel_name(launch: Launch) -> str:
    """The kernel's name in keys: within this package without the package's name, elsewhere with its module's."""
    return launch.name.removeprefix(_PACKAGE)


def parameters(kernel: Any) -> list[tuple[str, bool, Any, bool, bool]]:
    """What `Launcher.declare` takes of a @triton.jit function.

    Returns: for each parameter its name, whether it is a constant, its default (inspect.Parameter.empty where it has
    none), whether an integer 1 is compiled in, and whether it matters that 16 divides it.

    Raises:
        TypeError: a parameter names its type, which the launcher does not read.
    """
    rows = []
    for p in kernel.params:
        if p.annotation_type:
            raise TypeError(f"{kernel.fn.__qualname__}: the parameter {p.name} is {p.annotation_type}: leave that out")
        free = p.do_not_specialize
        alignment = not (free or p.do_not_specialize_on_alignment)
        rows.append((p.name, p.is_constexpr, p.default, not free, alignment))
    return rows


def key_of(
    name: str,
    is_constant: Sequence[bool],
    specialisation: Specialisation,
    num_warps: int,
    num_stages: int,
    enable_fp_fusion: bool,
) -> str:
    """The key of a kernel's variant; is_constant says of each parameter in order whether it is a tl.constexpr."""
    signature, constants, attributes = specialisation
    codes = []
    for place, kind in enumerate(signature.values()):
        if kind != "constexpr":
            codes.append(f"{kind}:16" if (place,) in attributes else kind)
        elif is_constant[place]:
            codes.append(repr(constants[place,]))
        else:
            codes.append("None" if constants[place,] is None else "1")
    options = f"warps={num_warps} stages={num_stages} fused={int(enable_fp_fusion)}"
    return " ".join([name, *codes, options])


def key(launch: Launch) -> str:
    """The key of the variant that a launch needs."""
    return key_of(
        kernel_name(launch),
        [p.is_constexpr for p in launch.function.params],
        specialise(launch),
        launch.num_warps,
        launch.num_stages,
        launch.enable_fp_fusion,
    )

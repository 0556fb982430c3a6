"""A few calls of the digits' network, whose packs compile in seconds, and launches of them with real memory."""

from __future__ import annotations

import torch

from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs import calls
from sign_fast.kernels.packs.calls import Shape
from sign_fast.kernels.packs.key import key

OPERATORS = ("group_norm_silu", "group_norm_silu_backward", "projected_attention", "combine", "finish_images")


def table():
    """The first float32 call of some operators."""
    found = {}
    for call in calls.networks()["digits-uncond"]:
        first = call.arguments[0]
        tensor = first[0] if isinstance(first, tuple) else first
        if call.operator in OPERATORS and tensor.dtype == "float32":
            found.setdefault(call.operator, call)
    assert set(found) >= {"group_norm_silu", "projected_attention", "finish_images"}
    return {"small": list(found.values())}


def real(launch: Launch) -> Launch:
    """The launch with memory of the CPU's instead of the meta device's."""
    arguments = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in launch.arguments.items()
    }
    found = Launch(
        launch.kernel, launch.grid, arguments, launch.constants, launch.num_warps, launch.num_stages,
        launch.enable_fp_fusion,
    )  # fmt: skip
    assert key(found) == key(launch)
    return found


def launches(batch: int = 4, architecture: int = 90):
    """What the calls of `table` launch."""
    return [real(launch) for call in table()["small"] for launch in call.launches(batch, KNOWN[architecture])]


def other_call() -> calls.Call:
    """A call that none of the packs has: a norm of 40 channels in 8 groups."""
    call = next(c for c in table()["small"] if c.operator == "group_norm_silu")

    def changed(argument):
        if not isinstance(argument, Shape):
            return 8 if argument == 6 and argument is not True else argument
        size = tuple(40 if n == 24 else n for n in argument.size)
        memory = torch.empty([4 if n < 0 else n for n in size], device="meta")
        if len(size) == 4:
            memory = memory.to(memory_format=torch.channels_last)
        return Shape(argument.dtype, size, memory.stride())

    return calls.Call(call.operator, tuple(map(changed, call.arguments)))


def other_shape() -> Launch:
    """Its launch."""
    (launch,) = other_call().launches(4, KNOWN[90])
    return real(launch)

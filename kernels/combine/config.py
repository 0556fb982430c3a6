"""How many elements a program of the combination takes: an analytical rule, nothing is timed.

A thread takes 16 bytes of the narrowest tensor, so that all accesses are that wide. Programs of 4 warps; fewer where
there would not be two programs for every multiprocessor, since one small image should still spread over the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..device import Device


@dataclass(frozen=True)
class Call:
    """What the rule looks at: elements of all images, bytes of the narrowest tensor's element."""

    elements: int
    itemsize: int


@dataclass(frozen=True)
class Plan:
    """elements: what a program takes, a power of two; num_warps: of a program."""

    elements: int
    num_warps: int


def plan(call: Call, device: Device) -> Plan:
    """The launch configuration of one call on `device`."""
    a_warp, warps = 32 * 16 // call.itemsize, 4
    while warps > 1 and -(-call.elements // (a_warp * warps)) < 2 * device.multiprocessors:
        warps //= 2
    return Plan(a_warp * warps, warps)

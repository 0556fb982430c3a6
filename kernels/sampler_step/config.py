"""How many elements a program of the sampler step takes: an analytical rule, nothing is timed.

A thread takes 8 elements, two Philox calls whose latencies overlap and 16 bytes of a half-precision image; the bytes at
the end take 16 a thread, one wide store. Programs of 4 warps; fewer where there would not be two programs for every
multiprocessor, since one small image should still spread over the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..device import Device

# {device name: {Call with batch=0: Plan}}: measured exceptions to the rule, for any batch
TUNED: dict[str, dict[Call, Plan]] = {}


@dataclass(frozen=True)
class Call:
    """What the rule looks at: images, elements of each, and whether bytes are written."""

    batch: int
    elements: int
    to_bytes: bool = False


@dataclass(frozen=True)
class Plan:
    """elements: what a program takes, a power of two; num_warps: of a program."""

    elements: int
    num_warps: int


def plan(call: Call, device: Device) -> Plan:
    """The launch configuration of one call on `device`."""
    tuned = TUNED.get(device.name, {}).get(replace(call, batch=0))
    if tuned is not None:
        return tuned
    per_thread, warps = 16 if call.to_bytes else 8, 4
    while warps > 1 and call.batch * -(-call.elements // (32 * per_thread * warps)) < 2 * device.multiprocessors:
        warps //= 2
    return Plan(32 * per_thread * warps, warps)

"""Which GroupNorm–SiLU kernels run, with which blocks: an analytical rule, nothing is timed.

A program takes a bundle of whole groups of one sample. In channels_last a bundle is a run of channels in every pixel:
at least 32 bytes of it (a memory sector), 64 or more where that leaves programs enough, and a multiple of 16 bytes so
that every access is that wide. In NCHW a group is one run of memory and a bundle is as many groups as fit.

1. `tile`, one read: where the bundle's pixels fit in registers. A thread holds 32 to 64 of the tile's elements; more
   spill, as the code-generation table shows, which gives the caps below.
2. `loop`, a second walk of the same program over its pixels: where there is a program for every multiprocessor and
   what runs at a time fits into the L2 cache with room to spare, so that the second read comes
   from there; or where a program's own share is small.
3. `split`, spans of pixels shared out over a workspace: few large samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ..device import Device

MAX_GROUP_CHANNELS = 4096  # a wider group's channels alone would fill a program's registers
SPANS = 64  # of a split sample at most: every program adds all of them up
SPAN_CHANNELS = 8192  # spans × channels of a bundle, whose sums a program adds up
MEMBERS = 4096  # channels × groups of a bundle, which a sum over groups spreads out in registers


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    Args:
        strategy: tile, loop or split, see the module text.
        bundle: channels a program takes, whole groups.
        block_channels, block_pixels: its tile, powers of two.
        span: pixels a program takes where the sample is split, else all of them.
        num_warps: of a program.
    """

    strategy: Literal["tile", "loop", "split"]
    bundle: int
    block_channels: int
    block_pixels: int
    span: int
    num_warps: int


@dataclass(frozen=True)
class Call:
    """What the rule looks at.

    joins: the residual form; pair: two tensors read as concatenated; float16: rather than bfloat16 or float32.
    """

    batch: int
    channels: int
    pixels: int
    groups: int
    itemsize: int
    channels_last: bool
    backward: bool = False
    joins: bool = False
    pair: bool = False
    float16: bool = False


# {device name: {Call with batch=0: Plan}}: measured exceptions to the rule, by hand or by benchmarks, for any batch
TUNED: dict[str, dict[Call, Plan]] = {}


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile_cap(call: Call, device: Device) -> int:
    """Elements of a tile that 16 warps (8 in float32 backward) hold without spilling."""
    heavy = call.backward or call.joins or (call.pair and call.itemsize == 4)
    older = device.architecture < 90 and (call.float16 or call.itemsize == 4)
    return 16384 if heavy or older else 32768


def _tile_warps(call: Call, block: int, pixels: int) -> int:
    """32 elements a thread, 16 where the channels' own coefficients take registers as well.

    In float32 backward at most 8 warps, whose threads may have twice the registers.
    """
    per_thread = 16 if block >= 16 * pixels else 32
    return _warps(block * pixels, per_thread, 8 if call.backward and call.itemsize == 4 else 16)


def _warps(elements: int, per_thread: int, most: int) -> int:
    return max(1, min(most, power_of_two(elements) // (32 * per_thread)))


def _bundles(call: Call) -> list[int]:
    """Widths to choose from, narrowest first."""
    group = call.channels // call.groups

    def multiples(unit: int) -> list[int]:
        widths = [unit * n for n in range(1, call.channels // unit + 1) if call.channels // unit % n == 0]
        # a group of one channel needs no such table, but the channels' coefficients take registers, too
        fit = [w for w in widths if power_of_two(w) * (8 if group == 1 else power_of_two(w // group)) <= MEMBERS]
        return fit or widths[:1]

    if not call.channels_last:
        return multiples(group)
    unit = group
    if call.channels * call.itemsize % 16 == 0:
        unit = math.lcm(group, 16 // call.itemsize)
        if unit > 512:  # odd, wide groups: narrower accesses cost less than such a bundle
            unit = group
    widths = multiples(unit)
    wide = [width for width in widths if width * call.itemsize >= 32]
    return wide or widths[-1:]


def plan(call: Call, device: Device) -> Plan:
    """The launch configuration of one forward or backward call on `device`."""
    tuned = TUNED.get(device.name)
    found = tuned.get(replace(call, batch=0)) if tuned else None
    return found or _rule(call, device)


@lru_cache(maxsize=4096)
def _rule(call: Call, device: Device) -> Plan:
    widths = _bundles(call)
    line = 128 // call.itemsize  # more than a cache line a pixel brings nothing
    enough = 2 * device.multiprocessors
    pixels = power_of_two(call.pixels)

    def programs(width: int) -> int:
        return call.batch * (call.channels // width)

    fitting = [w for w in widths if power_of_two(w) * pixels <= _tile_cap(call, device)]
    if device.architecture < 90:  # folds make the largest tiles spill there: only where nothing smaller fits
        fitting = [w for w in fitting if power_of_two(w) * pixels <= 16384] or fitting
    if fitting:
        # the widest that leaves two programs for every multiprocessor
        good = [w for w in fitting if programs(w) >= enough and (w <= line or not call.channels_last)]
        width = good[-1] if good else fitting[0]
        warps = _tile_warps(call, power_of_two(width), pixels)
        return Plan("tile", width, power_of_two(width), pixels, call.pixels, warps)

    width = widths[0]
    if call.channels_last:
        good = [w for w in widths if programs(w) >= enough and w * call.itemsize <= 64]
        width = good[-1] if good else width
    # 16 warps, one program a multiprocessor: fewer bytes at a time to keep in the cache; loads run ahead of their use
    block = power_of_two(width)
    half = call.backward or call.joins or call.pair or block >= 256  # more would spill
    step = min(pixels, max(1, (4096 if half else 8192) // block))
    warps = _warps(block * step, 8 if half else 16, 8 if call.backward and call.itemsize == 4 else 16)
    own = width * call.pixels * call.itemsize * (2 if call.backward or call.joins else 1)
    at_a_time = own * min(programs(width), device.multiprocessors)
    if own <= 96 << 10 or (programs(width) >= device.multiprocessors and at_a_time <= 0.7 * device.l2_bytes):
        return Plan("loop", width, block, step, call.pixels, warps)
    most = min(SPANS, max(1, SPAN_CHANNELS // block), math.ceil(call.pixels / step))
    spans = max(1, min(most, math.ceil(enough / programs(width))))
    span = math.ceil(call.pixels / spans / step) * step
    return Plan("split", width, block, step, span, warps)

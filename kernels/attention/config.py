"""Which tiles attention runs with: an analytical rule, nothing is timed.

The accumulators and operands of a program must fit in registers, its tiles in shared memory. Both follow from d, the
type and the architecture, so the rule is a table in the order of preference, found by compiling (the code-generation
benchmark holds it to no spills): the first row whose shared memory the device has is taken. On Hopper, tiles of 64
rows or more and warps in fours make the products wgmma. Float32 runs without matrix units, in smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..device import Device

Kernel = Literal["forward", "backward_query", "backward_key"]


@dataclass(frozen=True)
class Plan:
    """How one launch runs.

    Args:
        block_queries, block_keys: rows of a tile of q and of k.
        block_channels: d up to a power of two of at least 16.
        num_warps: of a program.
        num_stages: tiles of the loop in flight.
    """

    block_queries: int
    block_keys: int
    block_channels: int
    num_warps: int
    num_stages: int


# (queries, keys, warps, stages) in order of preference, by kernel and widest block_channels
_HALF: dict[Kernel, dict[int, list[tuple[int, int, int, int]]]] = {
    "forward": {
        64: [(128, 64, 8, 3), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)],
        256: [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)],
    },
    "backward_query": {
        64: [(64, 64, 8, 2), (64, 32, 8, 2)],
        128: [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)],
        256: [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)],
    },
    "backward_key": {
        64: [(64, 64, 8, 2), (32, 64, 8, 2)],
        128: [(64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1)],
        256: [(32, 64, 8, 2), (32, 32, 8, 1)],
    },
}
_FLOAT: dict[Kernel, dict[int, list[tuple[int, int, int, int]]]] = {
    "forward": {128: [(32, 32, 8, 1)], 256: [(32, 16, 8, 1)]},
    "backward_query": {64: [(32, 32, 8, 1)], 128: [(64, 32, 8, 1), (32, 32, 8, 1)], 256: [(32, 16, 8, 1)]},
    "backward_key": {128: [(32, 32, 8, 1)], 256: [(16, 32, 8, 1)]},
}

# {device name: {(kernel, tokens, channels, itemsize): Plan}}: measured exceptions to the rule
TUNED: dict[str, dict[tuple[Kernel, int, int, int], Plan]] = {}


def power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())  # 16: the least that a matrix product takes


def _shared_bytes(kernel: Kernel, queries: int, keys: int, row: int, stages: int) -> int:
    """Bytes of the tiles: what a program keeps, and what streams through it `stages` deep."""
    if kernel == "forward":
        return (queries + 2 * keys * stages) * row
    if kernel == "backward_query":
        return (2 * queries + 2 * keys * stages) * row
    return (2 * keys + 2 * queries * stages) * row + 1024


def _crowded(kernel: Kernel, block: int, masked: bool, strided: bool, itemsize: int) -> bool:
    """Whether the first choice spills because masked or gathered channels take registers of their own."""
    if itemsize == 4:
        return strided and kernel == "backward_query"
    if kernel == "backward_key":
        return masked or (strided and block <= 128)
    return kernel == "backward_query" and strided and block > 128


def plan(
    kernel: Kernel, tokens: int, channels: int, itemsize: int, heads: int, device: Device, strided: bool = False
) -> Plan:
    """The launch configuration of `kernel` for `heads` heads (over the whole batch) of (tokens, channels).

    strided: whether neighbouring channels of q, k and v lie apart, as in an interleaved projection.
    """
    tuned = TUNED.get(device.name, {}).get((kernel, tokens, channels, itemsize))
    if tuned is not None:
        return tuned
    block = power_of_two(channels)
    rows = (_HALF if itemsize == 2 else _FLOAT)[kernel]
    choices = rows[min(width for width in rows if width >= block)]
    if _crowded(kernel, block, channels != block, strided, itemsize) and len(choices) > 1:
        choices = choices[1:]
    longest = power_of_two(tokens)

    def programs(queries: int) -> int:
        return heads * -(-tokens // queries)

    fitting = [c for c in choices if _shared_bytes(kernel, c[0], c[1], block * itemsize, c[3]) <= device.shared_bytes]
    queries, keys, warps, stages = (fitting or choices[-1:])[0]
    if kernel == "forward" and queries == 128 and programs(128) < 2 * device.multiprocessors:
        # few heads: more, smaller programs fill the GPU
        queries, warps = 64, (4 if block <= 64 else 8)
    return Plan(min(queries, longest), min(keys, longest), block, warps, stages)

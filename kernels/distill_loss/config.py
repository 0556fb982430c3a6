"""How the distillation losses are cut into programs: an analytical rule, nothing is timed.

A thread reads 16 bytes of every input at a time. A sample that one program can hold (`on_chip_limit`, found by
compiling: three inputs and what is made of them fit in registers) gives losses and gradients in one read. Elsewhere a
program sums a span of a sample, at most `SPANS` a sample, and gradients are a second pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..device import Device

SPANS = 128


@dataclass(frozen=True)
class Plan:
    """block elements a step, span elements a program, num_warps of a program."""

    block: int
    span: int
    num_warps: int


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def plan(batch: int, size: int, device: Device) -> Plan:
    """For the sums: steps of 2048 elements, and as many spans as give every multiprocessor two programs."""
    block = max(32, min(2048, power_of_two(size)))
    wanted = -(-2 * device.multiprocessors // max(1, batch))
    spans = max(1, min(SPANS, wanted, -(-size // block)))
    if spans > 1 or size > 16 * block:
        spans = max(spans, min(SPANS, -(-size // (16 * block))))
    span = math.ceil(size / spans / block) * block
    return Plan(block, span, 8 if block >= 2048 else 4)


def elementwise(size: int) -> Plan:
    """For the gradients alone."""
    block = max(32, min(2048, power_of_two(size)))
    return Plan(block, block, 8 if block >= 2048 else 4)


def on_chip_limit(itemsize: int, device: Device) -> int:
    """Elements of a sample that a program holds without spilling: packed half precision takes half the registers."""
    return 16384 if itemsize == 2 and device.architecture < 120 else 8192


def on_chip(size: int, itemsize: int, device: Device) -> Plan | None:
    """For losses and gradients at once, or None where a sample is too large."""
    if size > on_chip_limit(itemsize, device):
        return None
    block = max(32, power_of_two(size))
    return Plan(block, block, max(1, min(16, block // (32 * 16))))

"""The GPUs whose launch configurations a pack is compiled for: all on which its code runs, as far as they differ.

Block sizes follow from a GPU's multiprocessors, second-level cache and shared memory. Data sheets give those of the
GPUs listed here; multiprocessors in between and below (smaller cards, slices of large ones) are filled in, since the
configurations change at a few numbers of them only.
"""

from __future__ import annotations

from dataclasses import replace

from ..device import KNOWN, Device
from .architectures import Architecture

_SLICES = (14, 20, 28, 40, 60, 96)  # multiprocessors besides the listed GPUs'


def _gpus(
    base: Device, capability: tuple[int, int], shared_kib: int, *figures: tuple[str, int, int]
) -> tuple[Device, ...]:
    """Devices by (name, multiprocessors, MB of second-level cache), and the slices of the first."""
    base = replace(base, capability=capability, shared_bytes=shared_kib << 10)
    listed = [
        replace(base, name=name, multiprocessors=count, l2_bytes=megabytes << 20) for name, count, megabytes in figures
    ]
    most = max(device.multiprocessors for device in listed)
    slices = [replace(listed[0], multiprocessors=count) for count in _SLICES if count < most]
    return (*listed, *slices)


_DEVICES: dict[int, tuple[Device, ...]] = {
    80: _gpus(KNOWN[80], (8, 0), 163, ("NVIDIA A100", 108, 40), ("NVIDIA A30", 56, 24)),
    86: _gpus(
        KNOWN[80], (8, 6), 99,
        ("NVIDIA GeForce RTX 3080", 68, 5), ("NVIDIA A10", 72, 6), ("NVIDIA RTX A6000", 84, 6),
    ),
    87: (replace(KNOWN[80], name="Orin", capability=(8, 7), multiprocessors=16, l2_bytes=4 << 20),),
    89: _gpus(
        KNOWN[89], (8, 9), 99,
        ("NVIDIA L40S", 142, 96), ("NVIDIA L4", 58, 48), ("NVIDIA GeForce RTX 4090", 128, 72),
        ("NVIDIA GeForce RTX 4080", 76, 64), ("NVIDIA GeForce RTX 4060", 24, 24),
    ),
    90: _gpus(
        KNOWN[90], (9, 0), 227,
        ("NVIDIA H100 SXM", 132, 50), ("NVIDIA H100 PCIe", 114, 50), ("NVIDIA H20", 78, 60),
        ("slice of an H100", 16, 6),
    ),
    100: _gpus(KNOWN[100], (10, 0), 227, ("NVIDIA B200", 148, 126), ("slice of a B200", 18, 16)),
    120: _gpus(
        KNOWN[120], (12, 0), 99,
        ("NVIDIA GeForce RTX 5090", 170, 96), ("NVIDIA GeForce RTX 5080", 84, 64),
        ("NVIDIA RTX PRO 6000 Blackwell", 188, 128), ("NVIDIA GeForce RTX 5060", 30, 32),
    ),
}  # fmt: skip


def devices(architecture: int) -> tuple[Device, ...]:
    """The GPUs of an architecture such as 90; of one that is not listed, those of the next lower one, renumbered."""
    listed = max(number for number in _DEVICES if number <= architecture)
    capability = divmod(architecture, 10)
    return tuple(replace(device, capability=capability) for device in _DEVICES[listed])


def devices_for(architecture: int, ptx: bool) -> tuple[Device, ...]:
    """The GPUs that a pack is compiled for: those on which the code of an architecture, or its PTX, runs."""
    own = Architecture(architecture)
    others = [n for n in _DEVICES if n != architecture and (n > architecture if ptx else own.runs_on(n))]
    return tuple(device for number in (architecture, *others) for device in devices(number))

"""Launches, and the launcher's calls for them: what the tests of the launcher share."""

from __future__ import annotations

import struct
from dataclasses import replace

import torch

from sign_fast.kernels import ahead_of_time
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.group_norm_silu.launches import launches_forward
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs import elf, key
from tests.example_kernels import add

STREAM = 0x5EED0


def declare(launcher, launch: Launch) -> str:
    name = key.kernel_name(launch)
    launcher.declare(name, key.parameters(launch.function))
    return name


def key_by(launcher, launch: Launch) -> str:
    name = declare(launcher, launch)
    options = (launch.num_warps, launch.num_stages, launch.enable_fp_fusion)
    return launcher.key(name, launch.arguments, launch.constants, *options)


def run(launcher, launch: Launch, device: int = 0, stream: int = STREAM):
    options = (launch.num_warps, launch.num_stages, launch.enable_fp_fusion)
    name = declare(launcher, launch)
    return launcher.launch(device, stream, name, launch.grid, launch.arguments, launch.constants, *options)


def compiled(launch: Launch, architecture: int = 90):
    done = ahead_of_time.compile(launch, architecture)
    sizes = elf.parameter_sizes(done.cubin, done.name)
    return [done.cubin, done.name, done.num_warps, done.shared_bytes, sizes]


def load(launcher, launch: Launch, device: int = 0, architecture: int = 90) -> None:
    declare(launcher, launch)
    launcher.add(device, key.key(launch), *compiled(launch, architecture))


def seen_by_kernel(launch: Launch) -> list[bytes]:
    """What the machine code has to find, from the launch and Triton's signature of it."""
    forms = {"i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f", "u1": "<B"}
    given = {**launch.arguments, **launch.constants}
    values = []
    for name, kind in ahead_of_time.specialise(launch).signature.items():
        if kind[0] == "*":
            values.append(struct.pack("<Q", given[name].data_ptr()))
        elif kind != "constexpr":
            values.append(struct.pack(forms[kind], given[name]))
    return [*values, bytes(8), bytes(8)]  # Triton's scratch pointers


def copy(n: int = 4096, **changes) -> Launch:
    return replace(add(torch.zeros(n), None, torch.zeros(n)), **changes)


def norm(channels: int = 128, height: int = 8, **given) -> Launch:
    x = torch.zeros(2, channels, height, height, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    ones, stats = torch.ones(channels), torch.zeros(2, 32, 3)
    (launch,) = launches_forward(x, None, torch.zeros_like(x), stats, 32, ones, ones, 1e-5, KNOWN[90], **given)
    return launch

"""Which of torchrun's processes this is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """rank of world processes, local_rank on this machine; (0, 1, 0) outside torchrun."""

    rank: int
    world: int
    local_rank: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """From the variables that torchrun sets."""
    number = os.environ.get
    return Process(int(number("RANK", "0")), int(number("WORLD_SIZE", "1")), int(number("LOCAL_RANK", "0")))


def device_for(process: Process, device: str | None) -> str | None:
    """The device of this process: the one named, else one GPU a process where there are GPUs."""
    import torch

    if device is not None or process.world == 1 or not torch.cuda.is_available():
        return device
    return f"cuda:{process.local_rank % torch.cuda.device_count()}"


def accumulation(batch: int, batch_gpu: int, world: int) -> int:
    """The fewest equal parts of a process's share of the batch that hold at most `batch_gpu` images each."""
    share = batch // world
    parts = -(-share // batch_gpu)
    while parts < share and share % parts:
        parts += 1
    return max(parts, 1)


@contextmanager
def process_group(process: Process, device_type: str) -> Iterator[None]:
    """A process group under torchrun, nothing for one process."""
    if process.world == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()

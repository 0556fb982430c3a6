"""What several processes of a training do together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import SharedError, SignFastError

_MESSAGE_BYTES = 4096


def place() -> tuple[int, int]:
    """(rank, number) of the processes, (0, 1) for one alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def raised_together(device: torch.device) -> Iterator[None]:
    """A SignFastError of one process in the block becomes one of all: else the others would wait for that process.

    All processes enter the block, and it ends with a collective; within it there must be none that comes after where
    one process may raise.

    Args:
        device: of this process.

    Raises:
        SharedError: the message of the first process that has one.
    """
    rank, world = place()
    if world == 1:
        yield
        return
    own: SignFastError | None = None
    try:
        yield
    except SignFastError as error:
        own = error
    first = torch.tensor(world if own is None else rank, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    source = int(first)
    if source == world:
        return
    text = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    if source == rank:
        encoded = str(own).encode()[:_MESSAGE_BYTES]
        text[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    text = text.to(device)
    dist.broadcast(text, source)
    raise SharedError(bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore")) from own


def data_parallel(net: nn.Module, *, unused: bool = False, views: bool = False) -> DistributedDataParallel:
    """The network in DDP; its buffers, constants of the layers, are never sent.

    Args:
        net: the same on all processes.
        unused: whether a backward pass may leave out parameters.
        views: gradients share the memory of DDP's buckets.
    """
    with warnings.catch_warnings():
        # torch 2.13's, whose new name for it torch 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            net, broadcast_buffers=False, find_unused_parameters=unused, gradient_as_bucket_view=views
        )

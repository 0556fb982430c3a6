"""Several processes: DDP, or FSDP2 for networks beyond one device; states that any number of processes can read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.unet_block import UNetBlock
from ..training.processes import data_parallel, place

_BUCKET_BYTES = 32 << 20  # of whole tensors that are gathered at once
_Name = TypeVar("_Name")

# ---- networks ----


def wrap(net: nn.Module) -> nn.Module:
    """The network as training calls it: in DDP where there are several processes and it is not sharded.

    Every parameter that wants a gradient must get one in each backward pass: `Trained` leaves out those that do not.
    """
    if place()[1] == 1 or is_sharded(net):
        return net
    return data_parallel(net, views=True)


def shard(net: nn.Module, device: torch.device, blocks: Sequence[nn.Module] | None = None) -> None:
    """FSDP2, in place: every U-Net block and then the rest are gathered where they run and given up after it.

    The weights move to the device one block at a time, so that a network on the CPU may be larger than a device.
    FSDP2 shards contiguous weights only, channels_last is for the activations.

    Args:
        net: the same on all processes.
        device: of this process.
        blocks: what is gathered at a time; None: its U-Net blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds to import, and seldom needed
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for p in net.parameters():
        p.data = p.data.contiguous()
    if blocks is None:
        blocks = [module for module in net.modules() if isinstance(module, UNetBlock)]
    for module in (*blocks, net):
        # the root too: left whole after a forward pass without gradient, it would miss the optimizer's next step
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard` was here."""
    return any(_is_dtensor(p) for p in net.parameters())


def _is_dtensor(t: object) -> bool:
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


@torch.no_grad()
def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, in the same memory: a shard of it, or the tensor itself without gradient."""
    return [t.to_local() if _is_dtensor(t) else t.detach() for t in tensors]  # type: ignore[attr-defined]


# ---- backward passes ----


@contextmanager
def reducing(calls: Sequence[nn.Module], last: bool) -> Iterator[None]:
    """Gradients of DDP networks are averaged over processes after the last part of a batch only.

    Those of FSDP networks are after every part: kept until the last, they would have to be whole on every device.
    """
    with ExitStack() as stack:
        if not last:
            for call in calls:
                if isinstance(call, DistributedDataParallel):
                    stack.enter_context(call.no_sync())
        yield


def backward_into_weights(
    outputs: Sequence[Tensor], seeds: Sequence[Tensor | None], weights: Sequence[Tensor], image: Tensor
) -> None:
    """Backward into the .grad of the weights and not of `image`, a leaf; the graph stays for another pass."""
    if not _is_dtensor(weights[0]):
        torch.autograd.backward(outputs, seeds, retain_graph=True, inputs=list(weights))
        return
    # the leaves of FSDP's graph are gathered weights, which the caller has no hold of
    torch.autograd.backward(outputs, seeds, retain_graph=True)
    image.grad = None


# ---- numbers of the whole batch ----


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over processes, without gradient."""
    world = place()[1]
    if world == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world


def total_norm(grads: Sequence[Tensor], sharded: bool) -> Tensor:
    """√Σ‖g‖², over all processes where each has a shard of the gradients."""
    norm = torch.nn.utils.get_total_norm(list(grads))
    if sharded:
        norm = norm.square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    return norm


# ---- states ----


def full_state(net: nn.Module, part: str | None = None) -> dict[str, Tensor]:
    """state_dict with whole tensors, on the CPU where they were shards. All processes call it.

    Args:
        net: whole or sharded.
        part: only what has this in its name; None: all.

    Returns:
        The state on the first process; shards' tensors are missing on the others.
    """
    return _whole({name: value for name, value in net.state_dict().items() if part is None or part in name})


def load_full_state(net: nn.Module, state: Mapping[str, Tensor], part: str | None = None) -> None:
    """Load `full_state`'s, whatever number of processes it is from. All processes call it with the same.

    Args:
        net: whole or sharded.
        state: of all that `part` names.
        part: as in `full_state`; what else the network has stays.

    Raises:
        KeyError: a tensor of the part is missing.
    """
    if part is not None:
        state = {name: state[name] for name in net.state_dict() if part in name}
    if is_sharded(net):
        own = net.state_dict()
        kept = {name: value for name, value in own.items() if name not in state} if part is None else {}
        state = {name: _like(value, own[name]) for name, value in state.items()} | kept
    net.load_state_dict(state, strict=part is None)


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """As `full_state`: what the optimizer knows of its n-th parameter; not its settings, which a run has anyway."""
    of_parameters = optimizer.state_dict()["state"]
    whole = _whole({(index, name): value for index, values in of_parameters.items() for name, value in values.items()})
    return {
        index: {name: whole[index, name] for name in values if (index, name) in whole}
        for index, values in of_parameters.items()
    }


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Load `full_optimizer_state`'s, whatever number of processes it is from. All processes call it with the same."""
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    own = {
        index: {name: _like(value, parameters[index]) for name, value in values.items()}
        for index, values in state.items()
    }
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


def _whole(values: Mapping[_Name, Any]) -> dict[_Name, Any]:
    """The values with the first process's shards made whole, and the others' left out."""
    shards = {name: value for name, value in values.items() if _is_dtensor(value)}
    whole = {name: value for name, value in values.items() if name not in shards}
    for bucket in _buckets(shards):
        whole.update(_gathered({name: shards[name] for name in bucket}))
    return {name: whole[name] for name in values if name in whole}


def _buckets(shards: Mapping[_Name, Tensor]) -> Iterator[list[_Name]]:
    """Names of tensors of one dtype, a few MB together: a collective costs more than a small weight's bytes."""
    bucket: list[_Name] = []
    size, dtype = 0, None
    for name, shard_ in shards.items():
        if bucket and (shard_.dtype != dtype or size + shard_.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size, dtype = size + shard_.nbytes, shard_.dtype
    if bucket:
        yield bucket


@torch.no_grad()
def _gathered(shards: Mapping[_Name, Tensor]) -> dict[_Name, Tensor]:
    """FSDP2's shards, whole and on the CPU, on the first process; nothing on the others. One collective.

    Not `full_tensor`: that is a collective a tensor, and its result is on every device.
    """
    rank, world = place()
    # FSDP2 cuts the first dimension as torch.chunk does: the last parts may be shorter, or empty
    rows = {name: -(-t.shape[0] // world) for name, t in shards.items()}
    sizes = {name: rows[name] * math.prod(t.shape[1:]) for name, t in shards.items()}
    own = local(list(shards.values()))
    part = own[0].new_zeros(sum(sizes.values()))
    for at, t in zip(part.split(list(sizes.values())), own, strict=True):
        at[: t.numel()].copy_(t.reshape(-1))
    parts = [torch.empty_like(part) for _ in range(world)] if rank == 0 else None
    dist.gather(part, parts, dst=0)
    if parts is None:
        return {}
    cut = [part.cpu().split(list(sizes.values())) for part in parts]
    # a copy each: a view would keep the whole bucket in memory, and in a saved file, or the padding
    return {
        name: torch.cat([of_rank[i] for of_rank in cut])[: t.numel()].clone().reshape(t.shape)
        for i, (name, t) in enumerate(shards.items())
    }


def _like(value: Any, own: Tensor) -> Any:
    """A copy of a whole tensor, cut and laid out as `own`, a parameter of its shape, is; what has no such shape stays.

    The strides must be the weight's: a fused optimizer walks weights and moments as raw memory, and those of FSDP2 are
    contiguous where DDP's are channels_last.
    """
    if not (isinstance(value, Tensor) and value.shape == own.shape):
        return value
    if not _is_dtensor(own):
        return torch.empty_like(own).copy_(value)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    mesh, placements = own.device_mesh, own.placements
    # every process has the value: none has to be sent one
    cut = distribute_tensor(value.to(own.device), mesh, placements, src_data_rank=None).to_local()
    part = torch.empty_like(own.to_local()).copy_(cut)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=own.shape, stride=own.stride())

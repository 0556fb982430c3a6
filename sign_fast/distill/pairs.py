"""The teacher's own samples (z, y, labels): SIGN's data where there is none, and the regression term's pairs."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.atomic import write_atomically
from ..data import indices_at
from ..errors import SignFastError, first_line
from ..inference.optimized import optimize
from ..models.precond import Precond
from ..sampling.edm import edm_sampler
from ..training.processes import raised_together
from ..training.seeds import seed_of
from .draws import Draws

FILE = "teacher_pairs.safetensors"
STEPS = 18  # of Heun's method, 35 calls a pair
_PAIRS = 13  # stream of random numbers
_BATCH = 500

Pairs = tuple[Tensor, Tensor, Tensor | None]


def network_hash(net: torch.nn.Module) -> str:
    """SHA-256 of names, shapes and values of a network's parameters and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def make_pairs(
    teacher: Precond, count: int, seed: int, rank: int = 0, world: int = 1, levels: Sequence[float] = ()
) -> Pairs:
    """`count` pairs by the teacher's ODE (EDM, Algorithm 2 without churn, 18 steps), z being its latents.

    A few-step student is called at falling noise levels σ_k. The pair of its call k > 1 begins at y + σ_k n, y and n
    being the sample of the first and new noise, and its z is (y + σ_k n)/σ_k.

    Args:
        teacher: on its device.
        count: over all processes, each of which makes its share and gets them all.
        seed: of latents and classes, which are a function of it and the pair's number alone.
        levels: σ_2 … σ_K of a student of K calls.

    Returns:
        (N, C, H, W) float32 z and y, or (N, K, C, H, W) where there are levels; (N, label_dim) one-hot rows or None; on
        the teacher's device.

    Raises:
        SignFastError: a sample is not finite.
    """
    device = next(teacher.parameters()).device
    net = optimize(teacher)
    share = -(-count // world)
    shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    parts: list[Pairs] = []
    for start in range(rank * share, (rank + 1) * share, _BATCH):
        size = min(_BATCH, (rank + 1) * share - start)
        draws = Draws(Draws.seeds_at(seed_of(seed, _PAIRS), 0, start, size).to(device))
        z, labels = draws.normal(0, shape), draws.labels(1, teacher.label_dim)
        y = edm_sampler(net, z, labels, num_steps=STEPS).float()
        starts, ends = [z], [y]
        for k, sigma in enumerate(levels):
            starts.append(y / sigma + draws.normal(2 + k, shape))
            ends.append(edm_sampler(net, starts[-1], labels, num_steps=STEPS, sigma_max=sigma).float())
        parts.append((torch.stack(starts, 1), torch.stack(ends, 1), labels) if levels else (z, y, labels))
    z = _from_all(torch.cat([part[0] for part in parts]), world)[:count]
    y = _from_all(torch.cat([part[1] for part in parts]), world)[:count]
    one_hot = [labels for *_, labels in parts if labels is not None]
    if not bool(torch.isfinite(y).all()):
        raise SignFastError("the teacher's samples are not finite: its weights are damaged, or it did not train")
    return z, y, _from_all(torch.cat(one_hot), world)[:count] if one_hot else None


def _from_all(part: Tensor, world: int) -> Tensor:
    """The parts of all processes, in the order of their ranks."""
    if world == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def pairs_of(
    teacher: Callable[[], Precond],
    teacher_hash: str,
    count: int,
    seed: int,
    folder: Path | None,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    levels: Sequence[float] = (),
) -> Pairs:
    """The pairs of a run: those in its folder where they are of this teacher, count and seed; else made and kept there.

    Args:
        teacher: gives the network, where pairs have to be made.
        teacher_hash: of `network_hash`.
        count, seed, rank, world, levels: as in `make_pairs`.
        folder: of the run; None keeps nothing.
        device: where the pairs go.

    Raises:
        SignFastError: a sample is not finite, or the file cannot be written.
    """
    facts = {"teacher": teacher_hash, "count": count, "seed": seed, "steps": STEPS}
    origin = json.dumps(facts | ({"levels": list(levels)} if levels else {}))
    found = None if folder is None else _read(folder / FILE, origin)
    if world > 1:  # all take the same way, whatever one of them has read
        everywhere = torch.tensor(float(found is not None), device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        found = found if bool(everywhere) else None
    if found is not None:
        z, y, labels = found
        return z.to(device), y.to(device), None if labels is None else labels.to(device)
    made = make_pairs(teacher(), count, seed, rank, world, levels)
    if folder is not None:
        with raised_together(device):
            if rank == 0:
                tensors = {name: value.cpu().contiguous() for name, value in _named(made).items()}
                write_atomically(folder / FILE, lambda path: save_file(tensors, path, {"origin": origin}))
    return made


def _named(pairs: Pairs) -> dict[str, Tensor]:
    z, y, labels = pairs
    return {"z": z, "y": y} | ({} if labels is None else {"labels": labels})


def _read(path: Path, origin: str) -> Pairs | None:
    """The pairs in the file where they are of that origin, else None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("origin") != origin:
                return None
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors["z"], tensors["y"], tensors.get("labels")
    except (OSError, KeyError, SafetensorError) as error:
        warnings.warn(f"{path} is damaged ({first_line(error)}): making the pairs anew", stacklevel=2)
        return None


def pairs_at(pairs: Pairs, iteration: int, batch: int, seed: int, part: slice) -> Pairs:
    """A process's share of an iteration's pairs: epoch by epoch in an order drawn from the seed.

    Args:
        pairs: of `pairs_of`.
        iteration: from 0.
        batch: over all processes. part: this process's of it.
        seed: of the order.
    """
    z, y, labels = pairs
    chosen = torch.from_numpy(indices_at(iteration * batch, batch, len(z), seed)[part])
    chosen = chosen.to(z.device, non_blocking=True)
    return z[chosen], y[chosen], None if labels is None else labels[chosen]

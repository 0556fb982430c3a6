"""A SIGN student's figures beside its controls: quality, diversity, idempotence, reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sign_fast import functional
from sign_fast.checkpoints.store import find, read_config
from sign_fast.data import open_dataset
from sign_fast.distill.quality import Quality, no_quality, quality_for
from sign_fast.errors import SignFastError
from sign_fast.metrics.digits_classifier import bundled, statistics
from sign_fast.models import IdempotentPrecond, load
from sign_fast.sampling import ImageGenerator
from sign_fast.sampling.noise import SeededNoise

from .measure import Map, iterates, moves, rms

STEPS = 4
MOVES = 5
"""‖f^{k+1} − f^k‖ is told up to this k."""
HEUN_STEPS = (1, 2, 5, 18)
BATCH = 250
GRID_IMAGES = 16


@dataclass
class Found:
    """What `measure_network` found.

    Args:
        rows: the table, one a sampler and number of steps.
        moves: RMS of f^{k+1} − f^k, k = 0 … 5, by name and start ("noise" or "data").
        grids: the first images (N, H, W, C) uint8 of each row, of the same seeds.
        classes: by row, the share of each class; empty where no classifier knows the images.
        notes: what could not be measured, and why.
    """

    rows: list[dict[str, Any]]
    moves: dict[str, dict[str, list[float]]]
    grids: dict[str, Tensor]
    classes: dict[str, list[float]]
    notes: list[str]


def multistep_levels(steps: int) -> list[float]:
    """τ_i = 1 − i/k, i = 1 … k − 1, as few-step students have it."""
    return [1 - i / steps for i in range(1, steps)]


class _Judge:
    """Fills in the figures that the images alone give."""

    def __init__(self, shape: tuple[int, int, int], found: Found) -> None:
        self.found = found
        self.quality: Quality | None = quality_for(shape)
        note = no_quality(shape)
        found.notes += [note] if note else []

    def add(self, name: str, images: Tensor, **facts: Any) -> None:
        """A row for (N, C, H, W) uint8 images; `facts` are its other columns."""
        row = {"name": name, "images": len(images)} | facts
        if self.quality is not None:
            row["frechet_distance"] = self.quality(images)
            net, _, real = bundled()
            row["diversity"] = float(np.trace(statistics(net, images.cpu()).covariance) / np.trace(real))
            predicted = torch.cat([net(part.float() / 127.5 - 1).argmax(1) for part in images.cpu().split(500)])
            share = torch.bincount(predicted, minlength=10) / len(images)
            row["effective_classes"] = float(torch.special.entr(share.double()).sum().exp())
            self.found.classes[_title(row)] = share.tolist()
        self.found.rows.append(row)
        self.found.grids[_title(row)] = images[:GRID_IMAGES].permute(0, 2, 3, 1).cpu()


def _title(row: dict[str, Any]) -> str:
    return f"{row['name']}, k = {row['steps']}" if "steps" in row else row["name"]


def _pixels(images: Tensor) -> Tensor:
    """uint8 as the samplers make it, (N, C, H, W)."""
    return functional.to_uint8(images.float()).permute(0, 3, 1, 2)


def _generated(generator: ImageGenerator, num: int, steps: int, **options: Any) -> Tensor:
    """(N, C, H, W) uint8 of seeds 0 … num − 1."""
    batches = [range(start, min(start + BATCH, num)) for start in range(0, num, BATCH)]
    return torch.from_numpy(np.concatenate(list(generator.stream(batches, steps, **options)))).permute(0, 3, 1, 2)


def _held_out(source: str, shape: tuple[int, int, int], label_dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, C, H, W) uint8, the same in [-1, 1], and one-hot rows."""
    data = open_dataset(source)
    if data.shape != shape:
        raise SignFastError(
            f"the images of {source} are {data.shape} (C, H, W), the network's {shape}: name its --data"
        )
    images = torch.from_numpy(np.stack([data.image(i) for i in range(len(data))]))
    labels = None
    if label_dim:
        if data.num_classes != label_dim:
            raise SignFastError(f"{source} has {data.num_classes} classes, the network {label_dim}: name its --data")
        labels = torch.eye(label_dim)[torch.tensor([data.label(i) for i in range(len(data))])]
    return images, images.float() / 127.5 - 1, labels


def teacher_of(network: str, teacher: str | None) -> str:
    """The teacher named, or else the one that config.json names.

    Raises:
        SignFastError: neither is there, or the network is no student of SIGN.
    """
    config = read_config(find(network))
    if config["cls"] != "IdempotentPrecond":
        raise SignFastError(f"{network} takes a noise level: this report is of SIGN's students, which take none")
    named = teacher or config.get("trained", {}).get("teacher")
    if named is None:
        raise SignFastError(f"{network} does not say what it was distilled from: name the --teacher")
    return str(named)


def measure_network(network: str, teacher: str, data: str, num: int, device: torch.device) -> Found:
    """Everything that is told of one student.

    Args:
        network: folder or bundled name of a time-free student.
        teacher: of the denoiser that it came from.
        data: held-out images.
        num: images a row, of seeds 0 … num − 1.
        device: where it runs.

    Raises:
        SignFastError: network, teacher and data do not fit.
    """
    generator, source = ImageGenerator.from_pretrained(network, device), load(teacher, device)
    shape = generator.image_shape
    if (source.img_channels, source.img_resolution, source.label_dim) != (shape[0], shape[1], generator.label_dim):
        raise SignFastError(f"the teacher {teacher} makes other images than {network}: name the one it came from")
    real, x, x_labels = _held_out(data, shape, generator.label_dim)
    x, x_labels = x.to(device), None if x_labels is None else x_labels.to(device)
    noise = SeededNoise(device, range(num))
    z = noise.randn([num, *shape])
    z_labels = None
    if generator.label_dim:
        z_labels = torch.eye(generator.label_dim, device=device)[noise.randint(generator.label_dim, size=[num])]
    found = Found([], {}, {}, {}, [])
    judge = _Judge(shape, found)
    judge.add("held-out data", real)

    def figures(name: str, f: Map) -> tuple[list[Tensor], list[dict[str, float]]]:
        """The iterates from noise, and the columns of idempotence and reconstruction for k = 0, 1, …"""
        from_noise, from_data = iterates(f, z, z_labels, MOVES + 1, BATCH), iterates(f, x, x_labels, MOVES + 1, BATCH)
        found.moves[name] = {"noise": moves(from_noise), "data": moves(from_data)}
        pairs = zip(found.moves[name]["noise"], found.moves[name]["data"], from_data, strict=False)
        return from_noise, [{"move_noise": a, "move_data": b, "reconstruction": rms(y, x)} for a, b, y in pairs]

    def call(u: Tensor, labels: Tensor | None) -> Tensor:
        return generator.net(u) if labels is None else generator.net(u, labels)

    _, columns = figures("student, recursive", call)
    for k in range(1, STEPS + 1):
        images = _generated(generator, num, k, sampler="recursive")
        judge.add("student, recursive", images, steps=k, calls=k, **columns[k])
    for k in range(2, STEPS + 1):
        images = _generated(generator, num, k, sampler="multistep", noise_levels=multistep_levels(k))
        judge.add("student, multi-step", images, steps=k, calls=k, noise_levels=multistep_levels(k))
    start = ImageGenerator(IdempotentPrecond.from_teacher(source)).net
    outputs, columns = figures(
        "student before training", lambda u, labels: start(u) if labels is None else start(u, labels)
    )
    judge.add("student before training", _pixels(outputs[1]), steps=1, calls=1, **columns[1])
    mean = x.mean(0, keepdim=True)
    controls: dict[str, Map] = {
        "identity": lambda u, labels: u,
        "constant (mean image)": lambda u, labels: mean.expand_as(u),
    }
    for name, f in controls.items():
        outputs, columns = figures(name, f)
        judge.add(name, _pixels(outputs[1]), calls=0, **columns[1])
    heun = ImageGenerator(source, "teacher")
    for steps in HEUN_STEPS:
        judge.add("teacher, Heun", _generated(heun, num, steps, sampler="edm"), steps=steps, calls=2 * steps - 1)
    return found

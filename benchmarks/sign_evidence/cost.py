"""What training costs, in passes through a network: the student's distillation against its teacher's training."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sign_fast.checkpoints.store import find, read_config
from sign_fast.distill.iteration import Iteration
from sign_fast.distill.networks import build_networks, load_teacher
from sign_fast.distill.settings import DistillSettings
from sign_fast.errors import SignFastError

_BATCH = 2
HEUN_CALLS = 35
"""Forward passes for a sample of the teacher (18 Heun steps), where the run is given some."""


class PassCounter:
    """Counts images that go forward and backward through networks while it is on.

    A backward pass to the weights counts apart from one that only goes through to the input.
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._handles = [net.register_forward_hook(self._hook(name)) for name, net in networks.items()]

    def _hook(self, name: str) -> Any:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.counts[name, "forward"] += len(output)
            if output.requires_grad:
                trains = any(p.requires_grad for p in module.parameters())
                kind = "backward to weights" if trains else "backward to input"
                output.register_hook(lambda grad: self.counts.update({(name, kind): len(grad)}))

        return forward

    def __enter__(self) -> PassCounter:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


WORTH = {"forward": 1, "backward to input": 1, "backward to weights": 2}
"""A pass in units of a forward pass: gradients of input and of weights each take about as long as one."""


def passes_an_image(settings: DistillSettings) -> dict[str, dict[str, float]]:
    """Passes for each image of the batch, counted during an iteration with the real networks: network -> kind -> count.

    Raises:
        SignFastError: the teacher cannot be loaded.
    """
    s = dataclasses.replace(settings, batch=_BATCH, accumulation=1)
    teacher, cls, kwargs = load_teacher(s.teacher, torch.device("cpu"))
    networks = build_networks(teacher, cls, kwargs, time_free=s.method == "sign", student_sigma=s.student_sigma)
    shape = (_BATCH, teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    images = torch.zeros(shape)
    labels = torch.eye(teacher.label_dim)[:1].expand(_BATCH, -1) if teacher.label_dim else None
    watched: dict[str, nn.Module] = {"teacher": teacher, "fake score": networks.fake, "student": networks.student}
    if networks.frozen is not None:
        watched["frozen student"] = networks.frozen
    updates = Iteration(s, networks)
    with PassCounter(watched) as counter:
        updates.run(0, images, labels, (images, images, labels) if s.reg else None)
    found: dict[str, dict[str, float]] = {name: {} for name in watched}
    for (name, kind), count in counter.counts.items():
        found[name][kind] = count / _BATCH
    return found


def seconds_of(run: Path) -> float | None:
    """What the iterations took by metrics.csv's images_per_second, None where a run has no such file."""
    path = run / "metrics.csv"
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("images_per_second")]
    images = [0.0] + [1000 * float(row["kimg"]) for row in rows]
    rates = [float(row["images_per_second"]) for row in rows]
    return sum((b - a) / rate for a, b, rate in zip(images, images[1:], rates, strict=False)) if rows else None


def _run_folder(network: str) -> Path:
    """The folder of the run, which holds the network's folder, or is it."""
    folder = find(network)
    return folder.parent if (folder.parent / "settings.json").exists() else folder


def settings_of(network: str) -> DistillSettings | None:
    """The settings that a run left beside its network, None where there are none."""
    path = _run_folder(network) / "settings.json"
    if not path.exists():
        return None
    known = DistillSettings.__dataclass_fields__
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return DistillSettings(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError) as error:
        raise SignFastError(f"{path} is not the settings of a distillation: name the --recipe") from error


def _worth(passes: dict[str, dict[str, float]]) -> float:
    return sum(WORTH[kind] * count for kinds in passes.values() for kind, count in kinds.items())


def training_cost(network: str, teacher: str, settings: DistillSettings) -> list[dict[str, Any]]:
    """Two rows, teacher and student: images, passes an image, passes in all in units of a forward pass, seconds."""
    rows = []
    passes = {
        "teacher": {"teacher": {"forward": 1.0, "backward to weights": 1.0}},
        "student": passes_an_image(settings),
    }
    for name, source in (("teacher", teacher), ("student", network)):
        trained = read_config(find(source)).get("trained", {})
        images = trained.get("images")
        by_kind: Counter[str] = Counter()
        for kinds in passes[name].values():
            by_kind.update(kinds)
        worth = _worth(passes[name])
        sampled = 0
        if name == "student" and (settings.reg or (settings.method == "sign" and settings.data is None)):
            sampled = settings.pairs * HEUN_CALLS
        rows.append(
            {
                "name": f"{name} ({source})",
                "images": images,
                **{kind.replace(" ", "_"): by_kind[kind] for kind in WORTH},
                "passes_an_image": worth,
                "sampling_passes": sampled,
                "passes": None if images is None else worth * images + sampled,
                "seconds": trained.get("seconds") or seconds_of(_run_folder(source)),
                "by_network": passes[name],
            }
        )
    return rows

"""A run of SiD, SiDA or SIGN with networks of `sign_fast.models`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.card import NO_DATA, SAMPLES, model_card
from ..checkpoints.store import CONFIG, save_network
from ..data import Dataset, open_dataset
from ..errors import SignFastError
from ..models.precond import Precond
from ..training.processes import place, raised_together
from .batches import Batches
from .divergence import all_finite
from .held_out import HeldOut, measured_on, read_held_out
from .iteration import Iteration
from .levels import call_levels
from .method import Losses
from .monitor import Monitor
from .networks import Networks, build_networks, load_teacher
from .pairs import Pairs, network_hash, pairs_of
from .parallel import full_state
from .quality import IDEMPOTENCE_COLUMNS, Quality, no_quality, quality_for
from .run import Run
from .settings import DistillSettings, check_fit, check_settings, remarks


class Distiller(Run):
    """One run; `run` goes to its end, resuming from the newest whole state in the folder.

    Args:
        settings: of the run.
        folder: for its results: settings.json, metrics.csv, quality.csv, curves.png, samples-*.png, state-*.pt,
            network/ (the averaged student of the last save) and best/ (that of the best quality); None keeps nothing,
            and only `step` works.
        device: where it runs.
        command: what started it, for the model card.
        quality: of the student's images; None takes `quality_for` their shape, where there is one.
        pairs: of `make_pairs` of this teacher, settings.pairs and settings.seed, for several runs to share; None makes
            them, or reads the folder's.

    Raises:
        SignFastError: teacher, data, processes and settings do not fit, or the folder is in use or of another run.
    """

    kind = "sign_fast distillation 2"
    mark = CONFIG
    settings: DistillSettings
    updates: Iteration
    monitor: Monitor
    _held_out: HeldOut | None = None

    def __init__(
        self,
        settings: DistillSettings,
        folder: Path | None,
        device: torch.device,
        command: str = "",
        quality: Quality | None = None,
        pairs: Pairs | None = None,
    ) -> None:
        check_settings(settings)
        _, world = place()
        # what is sharded goes to the device in shards
        first = torch.device("cpu") if settings.parallel == "fsdp" and world > 1 else device
        teacher, cls, kwargs = load_teacher(settings.teacher, first)
        if not all_finite(teacher):
            raise SignFastError(
                f"the teacher {settings.teacher} has weights that are not finite: it is damaged or its training "
                "diverged, name another --teacher"
            )
        dataset = open_dataset(settings.data) if settings.data is not None else None
        check_fit(settings, teacher, dataset, world)
        held_out = read_held_out(settings, teacher, dataset)
        self._teacher_hash = network_hash(teacher)  # before its precision changes
        networks = build_networks(
            teacher,
            cls,
            kwargs,
            time_free=settings.method == "sign",
            dropout=settings.dropout,
            student_sigma=settings.student_sigma,
        )
        self._setup(settings, networks, device, dataset, command, quality)
        self._held_out = held_out
        self.notes += [*remarks(settings, world), *measured_on(settings, held_out)]
        if pairs is not None:
            self._pairs = pairs
        if folder is not None:
            self._open(folder)

    @classmethod
    def from_networks(cls, settings: DistillSettings, networks: Networks) -> Distiller:
        """A run of networks that are at hand, which keeps nothing on disk."""
        self = cls.__new__(cls)
        self._teacher_hash = network_hash(networks.teacher)
        dataset = open_dataset(settings.data) if settings.data is not None else None
        self._setup(settings, networks, None, dataset)
        return self

    def _setup(
        self,
        settings: DistillSettings,
        networks: Networks,
        device: torch.device | None,
        dataset: Dataset | None,
        command: str = "",
        quality: Quality | None = None,
    ) -> None:
        self.settings, self.networks, self.dataset = settings, networks, dataset
        self.updates = Iteration(settings, networks, device)
        self.quality = quality
        self._begin(command)

    # ---- iterations ----

    def step(self) -> Losses:
        """One iteration, see `Iteration.run`."""
        images, labels, pairs = self._batches.at(self.iteration)
        losses = self.updates.run(self.iteration, images, labels, pairs)
        self.iteration += 1
        return losses

    @cached_property
    def _pairs(self) -> Pairs | None:
        if not self.settings.needs_pairs:
            return None
        s, u = self.settings, self.updates

        def teacher() -> Precond:  # the run's may be in shards, and in low precision
            return load_teacher(s.teacher, u.device)[0] if s.teacher else self.networks.teacher

        levels = call_levels(s)[1:]
        return pairs_of(teacher, self._teacher_hash, s.pairs, s.seed, self.folder, u.device, u.rank, u.world, levels)

    @cached_property
    def _batches(self) -> Batches:
        u, label_dim = self.updates, self.networks.teacher.label_dim
        return Batches(self.settings, self.dataset, self._pairs, label_dim, u.device, u.rank, u.world)

    def _prepare(self) -> None:
        _ = self._pairs

    def _trained(self) -> Sequence[nn.Module]:
        nets = self.networks
        return nets.student, nets.ema, nets.fake

    def _identity(self) -> dict[str, tuple[str, str]]:
        return {"teacher": (self._teacher_hash, self.settings.teacher)}

    def _monitor(self) -> Monitor:
        assert self.folder is not None
        pairs = self._pairs
        u, teacher = self.updates, self.networks.teacher
        shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
        quality = self.quality or quality_for(shape)
        if quality is None:
            self.notes.append(no_quality(shape) or "")
        samples = None if pairs is None else pairs[1:]
        held_out, folder = self._held_out, self.folder
        return Monitor(
            self.settings, self.networks, quality, held_out, samples, folder, self.iteration, u.device, u.rank
        )

    def _check(self, done: bool) -> dict[str, float]:
        """Measure on the first process; all stop together.

        Raises:
            SignFastError: the quality has been much worse than its best for some checks.
        """
        monitor = self.monitor
        values = monitor.check(self.iteration)
        measured = monitor.quality is not None
        figure = torch.tensor(values.get(f"quality_{monitor.steps[-1]}", 0.0), dtype=torch.float64)
        if self.updates.world > 1:
            figure = figure.to(self.updates.device)
            dist.broadcast(figure, 0)
        stop = self.guard.check(self.iteration, float(figure) if measured else None)
        best = full_state(self.networks.ema) if self.guard.is_best else None
        with raised_together(self.updates.device):
            if best is not None:
                figures = self._figures(values, monitor.steps) if self.updates.rank == 0 else {}
                self._save_network("best", best, figures)
            monitor.draw(now=done or bool(stop), stop_above=self.guard.limit)
        self._stop(stop)
        return values

    def _figures(self, values: dict[str, float], steps: Sequence[int]) -> dict[str, Any]:
        """For the card: the quality at the last of the step counts, how it was sampled, and the other figures."""
        count, (*others, chosen) = self.settings.quality_images, steps
        sampler = "recursive" if self.settings.method == "sign" else "few-step"
        found = {"Fréchet distance": round(values[f"quality_{chosen}"], 3)}
        sampling = {"images": count, "seeds": f"0-{count - 1}", "steps": chosen, "sampler": sampler}
        more = {f"Fréchet distance, steps {k}": round(values[f"quality_{k}"], 3) for k in others}
        names = [name for name in IDEMPOTENCE_COLUMNS if name in values]
        rms = {f"{name.replace('_', ', ')}, RMS": round(values[name], 4) for name in names}
        return found | sampling | more | rms

    @property
    def _data(self) -> str:
        """What the student was trained on, for the card."""
        if self.settings.method == "sid":
            return NO_DATA
        return self.settings.data or SAMPLES

    def _save_network(self, name: str, state: dict[str, Tensor], quality: dict[str, Any] | None = None) -> None:
        if self.updates.rank:
            return
        assert self.folder is not None
        s, nets = self.settings, self.networks
        facts: dict[str, Any] = {
            "role": "student",
            "trained": {
                "command": self.command,
                "method": s.method,
                "teacher": s.teacher,
                "data": self._data,
                "update": s.update,
                "steps": s.steps,
                "seed": s.seed,
                "iterations": self.iteration,
                "images": self.iteration * s.batch,
            },
        }
        if s.method != "sign":
            facts["sampling"] = {"steps": s.steps, "sigma": s.sigma_init}
        facts |= {"quality": quality} if quality else {}
        config = {"cls": nets.student_class, "kwargs": nets.student_kwargs, **facts}
        card = model_card(self.folder.name if name == "network" else f"{self.folder.name}, {name}", config)
        save_network(self.folder / name, state, nets.student_class, nets.student_kwargs, card=card, **facts)

    def close(self) -> None:
        """Let the folder go, and stop reading ahead; `run` does so at its end."""
        if "_batches" in self.__dict__:
            self._batches.close()
        super().close()

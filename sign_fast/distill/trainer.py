"""A distillation run: iterations, what it keeps on disk, exact resume, when it stops."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoints.atomic import clean_up, make_folder, write_text
from ..checkpoints.card import NO_DATA, SAMPLES, model_card
from ..checkpoints.lock import FolderLock
from ..checkpoints.store import CONFIG, save_network
from ..data import Dataset, open_dataset
from ..errors import SignFastError
from ..models.precond import Precond
from ..training.loop import Progress
from ..training.processes import place, raised_together
from ..training.state import load_newest, save_state, saved_states
from .batches import Batches
from .divergence import DivergenceGuard, all_finite
from .held_out import HeldOut, measured_on, read_held_out
from .iteration import Iteration
from .levels import call_levels
from .method import Losses
from .monitor import Monitor
from .networks import Networks, build_networks, load_teacher
from .pairs import Pairs, network_hash, pairs_of
from .parallel import full_state
from .quality import IDEMPOTENCE_COLUMNS, Quality, no_quality, quality_for
from .settings import DistillSettings, changed, check_fit, check_settings, plain, remarks

_KIND = "sign_fast distillation 2"
_SETTINGS = "settings.json"
_NETWORKS = ("network", "best")  # folders of students


class Distiller:
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
        self.guard = DivergenceGuard(settings.stop_factor)
        self.iteration = 0
        self.command, self.quality = command, quality
        self.folder: Path | None = None
        self.notes: list[str] = []
        self._lock: FolderLock | None = None

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

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> None:
        """Distil to the end of settings.kimg; calls `report` on rank 0 after each logged row.

        Raises:
            SignFastError: weights or losses are not finite, the quality got much worse, an image cannot be read, or a
                result cannot be written. The best student stays in FOLDER/best.
        """
        assert self.folder is not None, "a run needs a folder"
        s = self.settings
        monitor: Monitor | None = None
        try:
            pairs = self._pairs
            with raised_together(self.updates.device):
                monitor = self._monitor(pairs)
            seconds, at = 0.0, self.iteration
            while self.iteration < s.iterations:
                before = time.perf_counter()
                losses = self.step()
                done = self.iteration == s.iterations
                logs, checks, saves = (
                    done or self.iteration % every == 0 for every in (s.log_every, s.quality_every, s.save_every)
                )
                values = self._finite(losses) if logs or checks or saves else {}
                seconds += time.perf_counter() - before
                if logs:
                    speed = (self.iteration - at) * s.batch / seconds
                    values |= {"lr": self.updates.student.lr, "images_per_second": speed}
                    seconds, at = 0.0, self.iteration
                    monitor.write(self.iteration, values)
                if checks:
                    values |= self._check_quality(monitor, done)
                if saves:
                    self.save()
                if logs and self.updates.rank == 0:
                    report(Progress(self.iteration, s.iterations, values))
        finally:
            if monitor is not None:
                monitor.close()
                self.notes += [monitor.note] * bool(monitor.note)
            self.close()

    def _monitor(self, pairs: Pairs | None) -> Monitor:
        assert self.folder is not None
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

    def _finite(self, losses: Losses) -> dict[str, float]:
        """The losses' means over all processes.

        Raises:
            SignFastError: one of them or of the weights is not finite.
        """
        nets, names = self.networks, list(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        finite = all_finite(nets.student, nets.ema, nets.fake)
        row = torch.cat([values, finite.to(values).reshape(1)])
        if self.updates.world > 1:
            dist.all_reduce(row)
            row = row / self.updates.world
        *means, all_are = row.tolist()
        found = dict(zip(names, means, strict=True))
        # a gradient that overflows is loss scaling's business
        terms = [mean for name, mean in found.items() if not name.startswith("grad_norm")]
        stop = self.guard.check(self.iteration, finite=all_are == 1 and all(map(math.isfinite, terms)))
        self._stop(stop)
        return found

    def _check_quality(self, monitor: Monitor, done: bool) -> dict[str, float]:
        """Measure on the first process; all stop together.

        Raises:
            SignFastError: the quality has been much worse than its best for some checks.
        """
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
            monitor.draw(self.guard, now=done or bool(stop))
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

    def _stop(self, why: str) -> None:
        """All processes know the same reason, or none."""
        if why:
            with raised_together(self.updates.device):
                raise SignFastError(why + self._kept())

    def _kept(self) -> str:
        assert self.folder is not None
        best = self.folder / "best"
        if best.exists():
            return f"; {best} keeps the best student"
        return f"; {self.folder} keeps the last saved state" if saved_states(self.folder) else ""

    # ---- what is kept ----

    def save(self) -> None:
        """Write the averaged student and then a resumable state. All processes call it, the first one writes."""
        assert self.folder is not None
        updates = self.updates.state()
        state = {
            "kind": _KIND,
            "settings": plain(self.settings),
            "teacher": self._teacher_hash,
            "iteration": self.iteration,
            "updates": updates,
            "guard": self.guard.state_dict(),
        }
        with raised_together(self.updates.device):
            self._save_network("network", updates["ema"])
            if self.updates.rank == 0:
                save_state(self.folder, self.iteration, state, self.settings.keep)

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

    def _open(self, folder: Path) -> None:
        """Take the folder and go on from its newest whole state."""
        first, device, state = self.updates.rank == 0, self.updates.device, None
        try:
            with raised_together(device):
                self.folder = make_folder(folder)
                if first:
                    self._lock = FolderLock(self.folder)
                    state = self._newest()
            with raised_together(device):
                if not first:  # now that the first process has set aside what is damaged
                    state = self._newest()
            if state is not None:
                self._load(state)
            self._agree()
            with raised_together(device):
                if first:
                    clean_up(self.folder, *_NETWORKS)
                    write_text(self.folder / _SETTINGS, json.dumps(plain(self.settings), indent=1) + "\n")
        except BaseException:
            self.close()
            raise

    def _newest(self) -> dict[str, Any] | None:
        """The newest whole state of the folder, None where it holds nothing of worth.

        Raises:
            SignFastError: there are states but none is whole, or it is of something else or of other settings.
        """
        assert self.folder is not None
        state = load_newest(self.folder, set_aside=self.updates.rank == 0)
        before = self._settings_of(state)
        if before is not None and (names := changed(before, plain(self.settings))):
            raise SignFastError(
                f"{self.folder} holds a run with another {', '.join(names)}: repeat its settings "
                "(settings.json), or choose another --outdir"
            )
        return state

    def _agree(self) -> None:
        """That all processes go on from the same iteration.

        Raises:
            SignFastError: they do not see the same folder.
        """
        if self.updates.world == 1:
            return
        here = torch.tensor([self.iteration, -self.iteration], device=self.updates.device)
        dist.all_reduce(here, dist.ReduceOp.MAX)
        if here[0] != -here[1]:
            with raised_together(self.updates.device):
                raise SignFastError(
                    f"the processes found states of different iterations in {self.folder}: --outdir must be one folder "
                    "that all machines see"
                )

    def _settings_of(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The settings of what the folder holds, None where it holds nothing of worth.

        Raises:
            SignFastError: it is not of a distillation, or of another teacher.
        """
        assert self.folder is not None
        another = f"choose another --outdir, {self.folder} is left as it is"
        if state is None:
            if not any((self.folder / name / CONFIG).exists() for name in _NETWORKS):
                return None
            try:
                before = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = None
            if not isinstance(before, dict) or "method" not in before:
                raise SignFastError(f"{self.folder} holds a network that is not of a distillation: {another}")
            return before
        if state.get("kind") != _KIND:
            raise SignFastError(f"{self.folder} holds a run that is not a distillation: {another}")
        if state["teacher"] != self._teacher_hash:
            raise SignFastError(
                f"{self.folder} holds a run from another teacher than {self.settings.teacher}: {another}"
            )
        settings: dict[str, Any] = state["settings"]
        return settings

    def _load(self, state: dict[str, Any]) -> None:
        self.updates.load_state(state["updates"])
        self.guard.load_state_dict(state["guard"])
        self.iteration = state["iteration"]

    def close(self) -> None:
        """Let the folder go, and stop reading ahead; `run` does so at its end."""
        if "_batches" in self.__dict__:
            self._batches.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

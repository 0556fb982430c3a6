"""A run of any method: iterations, what it keeps on disk, exact resume, when it stops."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.atomic import clean_up, make_folder, write_text
from ..checkpoints.lock import FolderLock
from ..errors import SignFastError
from ..training.loop import Progress
from ..training.processes import raised_together
from ..training.state import load_newest, save_state, saved_states
from .divergence import DivergenceGuard, all_finite
from .iteration import Updates
from .method import Losses
from .run_monitor import RunMonitor
from .run_settings import RunSettings, changed, plain

_SETTINGS = "settings.json"
NETWORKS = ("network", "best")  # folders of students


class Run(ABC):
    """One run; `run` goes to its end, resuming from the newest whole state in the folder.

    Subclasses build `updates`, call `_begin` and, where there is a folder, `_open`.
    """

    kind: ClassVar[str]
    """Of its states."""
    mark: ClassVar[str]
    """The file that a folder with a student holds."""
    settings: RunSettings
    updates: Updates

    def _begin(self, command: str = "", figure: str = "quality") -> None:
        self.guard = DivergenceGuard(self.settings.stop_factor, figure=figure)
        self.iteration = 0
        self.command = command
        self.folder: Path | None = None
        self.notes: list[str] = []
        self._lock: FolderLock | None = None

    # ---- what the methods differ in ----

    @abstractmethod
    def step(self) -> Losses:
        """One iteration."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what iterations read. All processes call it."""

    @abstractmethod
    def _monitor(self) -> RunMonitor:
        """What logs; an error of one process is one of all."""

    @abstractmethod
    def _check(self, done: bool) -> dict[str, float]:
        """Measure, write the row, stop where the run has gone astray. All processes call it.

        Args:
            done: this is the last.
        """

    @abstractmethod
    def _trained(self) -> Sequence[nn.Module]:
        """The networks whose weights have to be finite."""

    @abstractmethod
    def _identity(self) -> dict[str, tuple[str, str]]:
        """Hash and name by kind ("teacher", …) of what a run must go on with, wherever it lies."""

    @abstractmethod
    def _save_network(self, name: str, state: dict[str, Tensor], quality: dict[str, Any] | None = None) -> None:
        """Write a student's folder; the first process does."""

    # ---- iterations ----

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> None:
        """Distil to the end of settings.kimg; calls `report` on rank 0 after each logged row.

        Raises:
            SignFastError: weights or losses are not finite, the quality got much worse, an image cannot be read, or a
                result cannot be written. The best student stays in FOLDER/best.
        """
        assert self.folder is not None, "a run needs a folder"
        s = self.settings
        monitor: RunMonitor | None = None
        try:
            self._prepare()
            with raised_together(self.updates.device):
                monitor = self.monitor = self._monitor()
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
                    values |= self._check(done)
                if saves:
                    self.save()
                if logs and self.updates.rank == 0:
                    report(Progress(self.iteration, s.iterations, values))
        finally:
            if monitor is not None:
                monitor.close()
                self.notes += [monitor.note] * bool(monitor.note)
            self.close()

    def _finite(self, losses: Losses) -> dict[str, float]:
        """The losses' means over all processes.

        Raises:
            SignFastError: one of them or of the weights is not finite.
        """
        names = list(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        finite = all_finite(*self._trained())
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
            "kind": self.kind,
            "settings": plain(self.settings),
            **{name: found for name, (found, _) in self._identity().items()},
            "iteration": self.iteration,
            "updates": updates,
            "guard": self.guard.state_dict(),
        }
        with raised_together(self.updates.device):
            self._save_network("network", updates["ema"])
            if self.updates.rank == 0:
                save_state(self.folder, self.iteration, state, self.settings.keep)

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
                    clean_up(self.folder, *NETWORKS)
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
        if before is not None and (names := changed(before, plain(self.settings), self._identity())):
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
            if not any((self.folder / name / self.mark).exists() for name in NETWORKS):
                return None
            try:
                before = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = None
            if not isinstance(before, dict) or "method" not in before:
                raise SignFastError(f"{self.folder} holds a network that is not of a distillation: {another}")
            return before
        if state.get("kind") != self.kind:
            raise SignFastError(f"{self.folder} holds a run that is not a distillation: {another}")
        for name, (found, place) in self._identity().items():
            if state.get(name) != found:
                raise SignFastError(f"{self.folder} holds a run from another {name} than {place}: {another}")
        settings: dict[str, Any] = state["settings"]
        return settings

    def _load(self, state: dict[str, Any]) -> None:
        self.updates.load_state(state["updates"])
        self.guard.load_state_dict(state["guard"])
        self.iteration = state["iteration"]

    def close(self) -> None:
        """Let the folder go; `run` does so at its end."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

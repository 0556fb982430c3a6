"""What every run writes while it goes: log rows and curves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..training.logs import RunLog
from ..training.processes import raised_together
from .curves import draw_curves
from .run_settings import RunSettings

_SECONDS_BETWEEN_CURVES = 60


class RunMonitor:
    """Logs of a run: all processes have one, the first one writes.

    Args:
        settings: of the run.
        tables: columns of each TABLE.csv after "iteration" and "kimg".
        folder: of the run.
        iteration: done so far; what later ones had logged is dropped.
        device: of the run.
        rank: of this process.

    Attributes:
        log: of the first process, None on others.
        note: a line on what is lacking for logs or curves, or "".
    """

    def __init__(
        self,
        settings: RunSettings,
        tables: Mapping[str, Sequence[str]],
        folder: Path,
        iteration: int,
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self._batch, self._title = settings.batch, f"{settings.method} from {settings.teacher}, seed {settings.seed}"
        self.folder, self.device, self.rank = folder, device, rank
        columns = {name: ["iteration", "kimg", *others] for name, others in tables.items()}
        self.log = None if rank else RunLog(folder, columns, iteration)
        self.note = "" if self.log is None else self.log.without_tensorboard
        self._drawn = time.monotonic()

    def write(self, iteration: int, values: Mapping[str, float], table: str = "metrics") -> None:
        """One row; what an iteration did not give is NaN. All processes call it."""
        with raised_together(self.device):
            if self.log is not None:
                whole = {name: values.get(name, math.nan) for name in self.log.columns(table)[1:]}
                self.log.write(iteration, whole | {"kimg": iteration * self._batch / 1000}, table)

    def draw(self, now: bool = False, stop_above: float | None = None) -> None:
        """curves.png, at most once a minute unless `now`; where it cannot be drawn `note` says so.

        Args:
            now: draw in any case.
            stop_above: the quality at which the run stops, a line of its panel.
        """
        if self.log is None or not (now or time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES):
            return
        self.note = draw_curves(self.folder, stop_above=stop_above, title=self._title) or self.note
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Of the logs."""
        if self.log is not None:
            self.log.close()

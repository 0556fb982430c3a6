"""What a run tells while it goes: metrics.csv always, TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import explain_os_errors, write_text


class RunLog:
    """Appends rows to metrics.csv and scalars to TensorBoard.

    Args:
        folder: of the run.
        columns: of the CSV; the first is the iteration.
        resume_at: iterations done; rows of later ones are dropped, a resumed run writes them again.
    """

    def __init__(self, folder: Path, columns: list[str], resume_at: int) -> None:
        self.columns = columns
        self.path = folder / "metrics.csv"
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                kept = list(csv.reader(file))[1:]
            rows = [row for row in kept if len(row) == len(columns) and int(row[0]) <= resume_at]
        text = io.StringIO()
        csv.writer(text).writerows([columns, *rows])
        write_text(self.path, text.getvalue())
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1 if resume_at else None)
        except ImportError:
            self.without_tensorboard = "TensorBoard logs are off: pip install 'sign-fast[train]'"
        else:
            self.without_tensorboard = ""

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One row; `values` has every column but the first."""
        with explain_os_errors(self.path), self.path.open("a", newline="") as file:
            csv.writer(file).writerow([iteration, *(f"{values[name]:.6g}" for name in self.columns[1:])])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

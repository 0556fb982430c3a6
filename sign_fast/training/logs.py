"""What a run tells while it goes: CSV files always, TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..checkpoints.atomic import explain_os_errors, write_text
from ..errors import SignFastError, first_line


class CsvTable:
    """A CSV file that rows are appended to, cut back to where a resumed run goes on.

    Args:
        path: of the file; rows that it holds already are kept, in the columns that are still there.
        columns: the first is the iteration.
        resume_at: iterations done; rows of later ones are dropped, a resumed run writes them again.

    Raises:
        SignFastError: the file cannot be read or written.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_at: int) -> None:
        self.path = path
        self.columns = list(columns)
        rows: list[list[str]] = []
        if path.exists():
            whole = [row for row in _rows(path) if None not in row and None not in row.values()]
            done = [row for row in whole if (row.get(self.columns[0]) or "").isdecimal()]
            kept = [row for row in done if int(row[self.columns[0]]) <= resume_at]
            rows = [[row.get(name, "") for name in self.columns] for row in kept]
        text = io.StringIO()
        csv.writer(text).writerows([self.columns, *rows])
        write_text(path, text.getvalue())

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """One row; `values` has every column but the first."""
        with explain_os_errors(self.path), self.path.open("a", newline="") as file:
            csv.writer(file).writerow([iteration, *(f"{values[name]:.6g}" for name in self.columns[1:])])


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SignFastError(f"cannot read {path} ({first_line(error)}): move it away, a new one is begun") from error


class RunLog:
    """Appends rows to CSV files, one a table, and scalars and images to TensorBoard.

    ::

        log = RunLog(folder, {"metrics": ["iteration", "loss"], "quality": ["iteration", "quality"]}, resume_at=0)
        log.write(100, {"loss": loss})
        log.write(1000, {"quality": 5.4}, "quality")

    Args:
        folder: of the run.
        tables: columns of each TABLE.csv; the first is the iteration.
        resume_at: iterations done; what later ones have logged is dropped, a resumed run logs it again.
    """

    def __init__(self, folder: Path, tables: Mapping[str, Sequence[str]], resume_at: int) -> None:
        self._tables = {name: CsvTable(folder / f"{name}.csv", columns, resume_at) for name, columns in tables.items()}
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1 if resume_at else None)
        except ImportError:
            self.without_tensorboard = "TensorBoard logs are off: pip install 'sign-fast[train]'"
        else:
            self.without_tensorboard = ""

    def write(self, iteration: int, values: Mapping[str, float | Tensor], table: str = "metrics") -> None:
        """One row of a table; `values` has every column but the first. Tensors are waited for."""
        numbers = {name: float(value) for name, value in values.items()}
        self._tables[table].write(iteration, numbers)
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, iteration)

    def columns(self, table: str) -> list[str]:
        """Those of a table, the first being the iteration."""
        return self._tables[table].columns

    def write_image(self, name: str, iteration: int, image: npt.NDArray[np.uint8]) -> None:
        """An (H, W, C) uint8 picture, for TensorBoard only."""
        if self._board is not None:
            self._board.add_image(name, image, iteration, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

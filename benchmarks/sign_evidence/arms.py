"""The arms of an ablation, and a file that keeps those that are finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ledger
from sign_fast.checkpoints.atomic import write_text
from sign_fast.distill.settings import DistillSettings
from sign_fast.errors import SignFastError, first_line

WHOLE = "all terms"
TERMS = ("rec", "idem", "flow", "dmd", "reg", "den")
_CHANGES: dict[str, dict[str, Any]] = {
    **{f"without {term}": {term: 0} for term in ("rec", "idem", "flow", "dmd", "reg")},
    "with reg": {"reg": 1},
    "SiD loss for dmd": {"matching": "sid"},
    "data-free": {"data": None},
}


def arms_of(settings: DistillSettings) -> dict[str, dict[str, Any]]:
    """Arms and the settings that each changes: all terms first, then those that are another run than these settings.

    There is none without den: the fake score then stays the teacher, dmd's direction is 0, and the run is the one
    without dmd. "with reg" is there only where the settings have none.
    """
    found: dict[str, dict[str, Any]] = {WHOLE: {}}
    for arm, changes in _CHANGES.items():
        another = any(getattr(settings, name) != value for name, value in changes.items())
        if another and not (arm == "with reg" and settings.reg):
            found[arm] = changes
    return found


def terms_of(settings: DistillSettings) -> str:
    """What "all terms" are: their weights."""
    return ", ".join(f"{term} {getattr(settings, term):g}" for term in TERMS)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run depends on beside its settings; kept with each result."""
    facts = ledger.environment(str(device))
    return {name: facts[name] for name in ("commit", "device", "threads", "torch")}


def environments_note(rows: Sequence[dict[str, Any]]) -> str:
    """Where the rows were measured, in one sentence, or one for each environment if they do not all come from one."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for place in row.get("environments", []):
            names = found.setdefault(place, [])
            names += [row["name"]] * (row["name"] not in names)
    if len(found) <= 1:
        return "".join(f"Measured with {place}." for place in found)
    lines = [f"{', '.join(names)}: {place}." for place, names in found.items()]
    return " ".join(["WARNING: these rows are of several environments, their seconds do not compare.", *lines])


def described(place: dict[str, Any]) -> str:
    """An `environment` in words."""
    return f"commit {place['commit']}, {place['device']}, {place['threads']} thread(s), torch {place['torch']}"


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the same row of several seeds: means of numbers, with standard deviations under "spread".

    A number that is the same in all runs stays as it is; a column that a run has not, or has None in, is None.
    """
    row: dict[str, Any] = {"spread": {}}
    for column, first in runs[0].items():
        values = [run.get(column) for run in runs]
        if all(value == first for value in values):
            row[column] = first
        elif all(isinstance(value, int | float) for value in values):
            numbers = torch.tensor(values, dtype=torch.float64)
            row[column] = float(numbers.mean())
            row["spread"][column] = float(numbers.std())
        elif all(isinstance(value, dict) for value in values):
            row[column] = over_seeds(values)
        else:
            row[column] = None
    return row


class Results:
    """Results by arm in a JSON file, which is whole at any time: an arm that is in it is not run again.

    Args:
        path: of the file; made by the first `get`.

    Raises:
        SignFastError: the file is there and unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            try:
                self._rows = list(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise SignFastError(f"{path} is not readable ({first_line(error)}): remove it and run again") from error

    def get(self, arm: str, settings: dict[str, Any], place: dict[str, Any], run: Callable[[], dict[str, Any]]) -> Any:
        """The result of these settings, of whichever arm and place; `run` is called where the file has none.

        Args:
            arm: for whom reads the file.
            settings: all that the result follows from, the teacher's hash included.
            place: `environment` in which `run` would run; a kept result has its own under "environment".
            run: gives the result.
        """
        key = json.loads(json.dumps(settings))
        for row in self._rows:
            if row.get("settings") == key and "environment" in row:
                return row
        row = {"arm": arm, "settings": key, "environment": place, **json.loads(json.dumps(run()))}
        self._rows.append(row)
        write_text(self.path, json.dumps(self._rows, indent=1) + "\n")
        return row

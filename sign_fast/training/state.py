"""Resumable training state: whole or absent, the last few kept, a damaged newest one falls back to the one before."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.atomic import write_atomically
from ..errors import first_line

_PATTERN = re.compile(r"state-(\d+)\.pt")


def _saved(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(m[1]), p) for p in folder.glob("state-*.pt") if (m := _PATTERN.fullmatch(p.name))]
    return sorted(found)


def save_state(folder: Path, iteration: int, state: dict[str, Any], keep: int) -> None:
    """Write state-ITERATION.pt in one step, then remove all but the newest `keep`.

    Raises:
        SignFastError: it cannot be written; the older ones are untouched.
    """
    write_atomically(folder / f"state-{iteration:08d}.pt", lambda path: torch.save(state, path))
    for _, path in _saved(folder)[:-keep]:
        path.unlink(missing_ok=True)


def load_newest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest whole state, or None where there is none; damaged ones are named in a warning and passed over."""
    for _, path in reversed(_saved(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            return state
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            warnings.warn(f"{path} is damaged ({first_line(error)}): falling back to the one before", stacklevel=2)
    return None

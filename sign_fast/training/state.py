"""Resumable training state: whole or absent, the last few kept, a damaged newest one falls back to the one before."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.atomic import explain_os_errors, write_atomically
from ..errors import SignFastError, first_line

_PATTERN = re.compile(r"state-(\d+)\.pt")
_CHUNK = 1 << 24


def saved_states(folder: Path) -> list[Path]:
    """The state-ITERATION.pt of a folder, the newest last, whole or not."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_state(folder: Path, iteration: int, state: dict[str, Any], keep: int) -> None:
    """Write state-ITERATION.pt in one step, then remove all but the newest `keep`.

    Raises:
        SignFastError: it cannot be written; the older ones are untouched.
    """
    written = folder / f"state-{iteration:08d}.pt"
    write_atomically(written, lambda path: torch.save(state, path))
    for path in saved_states(folder)[:-keep]:
        if path != written:
            path.unlink(missing_ok=True)


def load_newest(folder: Path, set_aside: bool) -> dict[str, Any] | None:
    """The newest whole state, on the CPU, or None where there is none; newer damaged ones are named in a warning.

    Args:
        folder: of the run.
        set_aside: rename the damaged ones to *.damaged, so that they do not count as the newest. For the process that
            holds the folder alone.

    Raises:
        SignFastError: there are states but none is whole, or the system cannot read one. No file has been touched.
    """
    damaged: dict[Path, str] = {}
    saved = saved_states(folder)
    for path in reversed(saved):
        try:
            # not onto a device, whose lack of memory would pass for damage
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle may raise anything
            _read_through(path, error)
            damaged[path] = first_line(error)
            continue
        for bad, why in damaged.items():
            warnings.warn(f"{bad} is damaged ({why}): falling back to {path.name}", stacklevel=2)
            if set_aside:
                with explain_os_errors(bad):
                    bad.replace(bad.with_name(f"{bad.name}.damaged"))
        return state
    if damaged:
        path, why = next(iter(damaged.items()))
        raise SignFastError(
            f"{folder} holds {len(saved)} saved state(s), all damaged ({path.name}: {why}): choose another --outdir, "
            "or move the states and networks in it away to begin anew"
        )
    return None


def _read_through(path: Path, error: Exception) -> None:
    """See that the file can be read to its end: where it cannot, `error` does not speak of its content.

    Raises:
        SignFastError: it cannot, or it was memory that did not suffice.
    """
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        raise SignFastError(f"not enough memory to read {path}: free some, or use a machine with more") from error
    try:
        if isinstance(error, OSError):
            raise error
        with path.open("rb") as file:
            while file.read(_CHUNK):
                pass
    except OSError as refused:
        why = refused.strerror or first_line(refused)
        raise SignFastError(f"cannot read {path} ({why}): mend that, or choose another --outdir") from refused

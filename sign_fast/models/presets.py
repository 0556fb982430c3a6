"""Named network configurations: the eight published ones and the library's own digits."""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from ..errors import SignFastError
from .idempotent import IdempotentPrecond
from .precond import EDMPrecond, Precond, VEPrecond, VPPrecond, iDDPMPrecond

CLASSES: dict[str, type[Precond]] = {
    "EDMPrecond": EDMPrecond,
    "IdempotentPrecond": IdempotentPrecond,
    "VEPrecond": VEPrecond,
    "VPPrecond": VPPrecond,
    "iDDPMPrecond": iDDPMPrecond,
}


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(files(__package__).joinpath("presets.json").read_text())
    return table


def preset_names() -> list[str]:
    """The names that `create` takes."""
    return list(_table())


def preset(name: str) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of a preset, e.g. ("EDMPrecond", {"img_resolution": 32, …}).

    Raises:
        SignFastError: the name is unknown; the message lists the names.
    """
    table = _table()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}? Known" if near else "known"
        raise SignFastError(f"unknown preset {name!r}: {hint}: {', '.join(table)}")
    entry = table[name]
    return entry["cls"], json.loads(json.dumps(entry["kwargs"]))


def create(preset_name: str, *, cls: str | None = None, **overrides: Any) -> Precond:
    """A network with fresh weights, by name.

    Args:
        preset_name: one of `preset_names()`, e.g. "cifar10-uncond-vp".
        cls: another class than the preset's, e.g. "IdempotentPrecond" for the student of such a teacher.
        overrides: replace or add constructor arguments, e.g. dropout=0, dtype=torch.bfloat16.

    Returns:
        The preconditioned network, in training mode on the CPU, weights drawn from torch's default generator.

    Raises:
        SignFastError: unknown name or class.
        TypeError: an override that no constructor knows.
    """
    own_cls, kwargs = preset(preset_name)
    if cls is not None and cls not in CLASSES:
        raise SignFastError(f"unknown class {cls!r}: known: {', '.join(CLASSES)}")
    return CLASSES[cls or own_cls](**{**kwargs, **overrides})

"""Which diffusers is here, and whether it is one that the integration has been tested with."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from typing import Any

from ...errors import SignFastError, first_line

TESTED_VERSIONS = ("0.35", "0.42")
"""The oldest and the newest minor version that the tests have run with."""

_INSTALL = "pip install 'sign-fast[diffusers]'"
_warned: set[str] = set()


def require_diffusers() -> Any:
    """The module diffusers.

    Warns once where its version is outside of `TESTED_VERSIONS`; what is used of it is looked for by name, so that
    another version works where its parts are as they were.

    Raises:
        SignFastError: it is not installed, or does not import.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise SignFastError(f"diffusers is not installed: {_INSTALL}")
    try:
        diffusers = importlib.import_module("diffusers")
    except Exception as error:  # its own dependencies may be missing or of other versions
        raise SignFastError(f"diffusers does not import ({first_line(error)}): {_INSTALL}") from error
    version = str(getattr(diffusers, "__version__", "unknown"))
    if not tested(version) and version not in _warned:
        _warned.add(version)
        oldest, newest = TESTED_VERSIONS
        warnings.warn(
            f"diffusers {version} is outside of the tested versions {oldest} to {newest}; going on: "
            f"what does not look as expected is left alone and listed",
            stacklevel=3,
        )
    return diffusers


def tested(version: str) -> bool:
    """Whether `version` lies in `TESTED_VERSIONS`, patch releases included."""
    oldest, newest = (_minor(bound) for bound in TESTED_VERSIONS)
    found = _minor(version)
    return found is not None and oldest is not None and newest is not None and oldest <= found <= newest


def _minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))

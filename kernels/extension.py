"""Loads the compiled extension ``sign_fast._C`` at first use and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
import json
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from .dispatch import Reason

_REBUILD = "reinstall with a C++ compiler at hand: pip install --no-build-isolation --force-reinstall --no-deps sign-fast"


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, Reason | None]:
    if os.environ.get("SIGN_FAST_DISABLE_EXT") == "1":
        return None, Reason("the C++ extension is switched off by SIGN_FAST_DISABLE_EXT=1", "unset it")
    import torch  # noqa: F401  the extension's symbols live in torch's libraries

    try:
        return importlib.import_module("sign_fast._C"), None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "sign_fast._C":
            return None, Reason(f"the C++ extension is not built ({_skipped_because()})", _REBUILD)
        return None, Reason(f"the C++ extension does not load: {error}", _REBUILD)


def _skipped_because() -> str:
    note = Path(__file__).with_name("extension_build.json")
    try:
        return str(json.loads(note.read_text())["skipped"])
    except (OSError, ValueError, KeyError):
        return "no build has been run"


def module() -> ModuleType | None:
    """The extension, or None where it is missing; `missing()` then says why."""
    return _load()[0]


def missing() -> Reason | None:
    """None when the extension is loaded, otherwise the reason (the real import error) and the remedy."""
    return _load()[1]

"""Loads the compiled extension ``sign_fast._C`` at first use and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
import json
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from .dispatch import Reason

_REBUILD = (
    "reinstall with a C++ compiler at hand: pip install --no-build-isolation --force-reinstall --no-deps sign-fast"
)


def _note() -> dict[str, str]:
    try:
        note: dict[str, str] = json.loads(Path(__file__).with_name("extension_build.json").read_text())
        return note
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, Reason | None]:
    if os.environ.get("SIGN_FAST_DISABLE_EXT") == "1":
        return None, Reason("the C++ extension is switched off by SIGN_FAST_DISABLE_EXT=1", "unset it")
    import torch

    note = _note()
    if "skipped" in note:  # an extension that an earlier build left in the tree is not this one
        return None, Reason(f"the C++ extension is not built: {note['skipped']}", _REBUILD)
    built_with = note.get("torch", torch.__version__)
    if built_with.split("+")[0] != torch.__version__.split("+")[0]:
        return None, Reason(
            f"the C++ extension was built with torch {built_with}, this is {torch.__version__}", _REBUILD
        )
    try:
        return importlib.import_module("sign_fast._C"), None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "sign_fast._C":
            return None, Reason("the C++ extension is not built: no build has been run", _REBUILD)
        return None, Reason(f"the C++ extension does not load: {error}", _REBUILD)


def module() -> ModuleType | None:
    """The extension, or None where it is missing; `missing()` then says why."""
    return _load()[0]


def missing() -> Reason | None:
    """None when the extension is loaded, otherwise the reason (the real import error) and the remedy."""
    return _load()[1]

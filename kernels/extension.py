"""Loads the compiled extension ``sign_fast._C`` at first use and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from .dispatch import Reason

_REBUILD = (
    "install a wheel that was built beside this torch and Python (python -m build --wheel --no-isolation), or from the "
    "sources with a C++ compiler: pip install --no-build-isolation --force-reinstall --no-deps FOLDER"
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
    built = note.get("torch", torch.__version__)
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:  # patch releases keep the binary interface
        return None, Reason(f"the C++ extension was built with torch {built}, this is {torch.__version__}", _REBUILD)
    here = "{}.{}".format(*sys.version_info)
    if note.get("python", here) != here:
        return None, Reason(f"the C++ extension was built for Python {note['python']}, this is {here}", _REBUILD)
    try:
        return importlib.import_module("sign_fast._C"), None
    except Exception as error:  # also what torch raises of operators that are registered twice
        if isinstance(error, ModuleNotFoundError) and error.name == "sign_fast._C":
            return None, Reason("the C++ extension is not built: no build has been run", _REBUILD)
        return None, Reason(_unloadable(built, torch.__version__, str(error)), _REBUILD)


def _unloadable(built: str, here: str, told: str) -> str:
    """One sentence in place of the loader's, which names files and symbols."""
    lacking = re.search(r"version `([\w.]+)' not found", told)
    if lacking is not None:
        return f"the C++ extension does not load: this system's libraries are older than its {lacking[1]}"
    plain = told and len(told) <= 60 and "\n" not in told and "symbol" not in told
    detail = f" ({told})" if plain else ""
    return f"the C++ extension, built with torch {built}, does not load with torch {here}{detail}"


def built_with() -> dict[str, str]:
    """What the build noted: torch, python, compiler, platform, and of a wheel with packs architectures and Triton."""
    return _note()


def module() -> ModuleType | None:
    """The extension, or None where it is missing; `missing()` then says why."""
    return _load()[0]


def missing() -> Reason | None:
    """None when the extension is loaded, otherwise the reason, in one sentence, and the remedy."""
    return _load()[1]

"""A pipeline's folder written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import explain_os_errors, replace_folder, write_text
from ...errors import SignFastError
from .loading import INDEX
from .lora import has_adapters
from .parts import PARTS

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
"""What the networks are to diffusers, whatever class of ours they have meanwhile."""


def save_folder(target: Path, networks: dict[str, Any], write: Callable[[Path], object], card: str | None) -> None:
    """Put a pipeline's folder in place of `target`; files beside the parts of an older one are kept.

    Args:
        target: a new folder, an empty one, or a pipeline's.
        networks: those of the pipeline, by name.
        write: writes the pipeline's files into the folder that it is given.
        card: text of README.md, or None to leave an older one.

    Raises:
        SignFastError: `target` holds something else, a network has adapters, or it cannot be written; `target` is as it
            was.
    """
    if target.exists() and not target.is_dir():
        raise SignFastError(f"{target} is a file: name a folder")
    if target.is_dir() and not (target / INDEX).is_file() and any(target.iterdir()):
        raise SignFastError(f"{target} holds other files than a pipeline's: name a new folder")
    for name, network in networks.items():
        if has_adapters(network):
            raise SignFastError(f"the {name} has adapters: call fuse_lora() and unload_lora_weights() before saving")

    def fill(temporary: Path) -> None:
        with explain_os_errors(target):
            write(temporary)
            for name, class_name in CLASSES.items():
                _say_class(temporary / name / "config.json", class_name)
            if card is not None:
                write_text(temporary / "README.md", card)
            _keep_others(target, temporary)

    replace_folder(target, fill)


def _say_class(path: Path, class_name: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("_class_name") != class_name:
        write_text(path, json.dumps({**config, "_class_name": class_name}, indent=2, sort_keys=True) + "\n")


def _keep_others(target: Path, temporary: Path) -> None:
    """Bring over what else lies in a pipeline's folder that is about to be replaced, e.g. a README."""
    for path in sorted(target.iterdir()) if target.is_dir() else ():
        if path.name in (INDEX, *PARTS) or (temporary / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, temporary / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, temporary / path.name)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)

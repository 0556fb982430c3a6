"""Networks on disk: a folder with config.json (class, arguments, what it is) and model.safetensors (the weights)."""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import SignFastError, first_line, short
from ..models.precond import Precond
from ..models.presets import CLASSES, preset_names
from . import published
from .atomic import replace_folder, write_text

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
NETWORK_FILES = (CONFIG, WEIGHTS, "README.md", "curves.png")
_FORMAT = "sign_fast network 1"
_MOST_STEPS = 10_000  # a folder may be anybody's, and should not generate for years


def bundled_names() -> list[str]:
    """Names of the networks that come with the library."""
    root = files(__package__).joinpath("bundled")
    return sorted(entry.name for entry in root.iterdir() if entry.joinpath(CONFIG).is_file()) if root.is_dir() else []


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """Where a network lies: its folder, or the file of a published snapshot.

    Raises:
        SignFastError: neither of these, nor a bundled name, nor a repository of the Hub.
    """
    text = os.fspath(path_or_name)
    path = Path(text)
    if text in bundled_names() and not path.is_dir():
        return Path(str(files(__package__) / "bundled" / text))
    if path.name in (WEIGHTS, CONFIG) and path.is_file():
        path = path.parent
    if path.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise SignFastError(f"{path} holds no {name}: name a folder with {CONFIG} and {WEIGHTS}")
        return path
    known = f"bundled: {', '.join(bundled_names()) or 'none'}"
    if path.is_file():
        if path.suffix.lower() in published.SUFFIXES:
            return path
        raise SignFastError(
            f"{path} is a file: a network is a folder with {CONFIG} and {WEIGHTS}, a published snapshot "
            f"({', '.join(published.SUFFIXES)}), or a bundled name ({known})"
        )
    if text in preset_names():
        raise SignFastError(
            f"{text!r} is a preset without weights: name a trained network's folder or a bundled name ({known})"
        )
    from . import hub

    if hub.is_repository(text):
        return hub.fetch(text)
    if path.suffix.lower() in published.SUFFIXES:
        raise SignFastError(f"no file {text!r}: name a published snapshot that is there")
    raise SignFastError(f"no network {text!r}: name a folder with {CONFIG} and {WEIGHTS}, or a bundled name ({known})")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, checked; of a published snapshot, what config.json would say, a role only if known.

    Raises:
        SignFastError: unreadable, not ours, or a class that the library does not have.
    """
    if folder.is_file():
        return _snapshot_config(published.read_snapshot(folder))
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SignFastError(f"{path} is not readable as JSON ({first_line(error)}): copy it again") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise SignFastError(f'{path} does not say "format": "{_FORMAT}": it is not a network of this library')
    if config.get("cls") not in CLASSES or not isinstance(config.get("kwargs"), dict):
        raise SignFastError(f"{path}: cls must be one of {', '.join(CLASSES)} and kwargs a table")
    check_use(config, path)
    return config


def check_use(config: dict[str, Any], path: object) -> None:
    """What config.json says of how images are made with the network, and of its making.

    Raises:
        SignFastError: no role, steps or noise level that there are, or no tables; `path` names it.
    """
    role, sampling = config.get("role", "student"), config.get("sampling", {})
    if role not in ("teacher", "student"):
        raise SignFastError(f"{path}: role must be teacher or student, not {short(role)}")
    numbers = isinstance(sampling, dict) and all(type(v) in (int, float) for v in sampling.values())
    if not numbers or not sampling.keys() <= {"steps", "sigma"} or type(sampling.get("steps", 1)) is not int:
        raise SignFastError(f"{path}: sampling must be a table of steps, a whole number, and sigma")
    sigma = sampling.get("sigma", 1)  # JSON of Python has NaN, and whole numbers that no float can hold
    if not 1 <= sampling.get("steps", 1) <= _MOST_STEPS or not 0 < sigma <= sys.float_info.max:
        raise SignFastError(f"{path}: sampling must have steps of 1 to {_MOST_STEPS:,} and sigma above 0, finite")
    for name in ("trained", "quality", "source"):
        if not isinstance(config.get(name, {}), dict):
            raise SignFastError(f"{path}: {name} must be a table, not {short(config[name])}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        SignFastError: missing, truncated or not a safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SignFastError(f"{path} is not a whole safetensors file ({first_line(error)}): copy it again") from error


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], source: object) -> None:
    """Compare names and shapes.

    Raises:
        SignFastError: naming up to three keys that are missing, unexpected or of another shape.
    """
    problems = []
    if missing := [key for key in expected if key not in state]:
        problems.append(f"lacks {_names(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        problems.append(f"has unknown {_names(unexpected)}")
    wrong = [
        f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if wrong:
        problems.append(f"has {_names(wrong)}")
    if problems:
        raise SignFastError(f"{source} {'; '.join(problems)}: weights and configuration are of different networks")


def build_meta(cls: str, kwargs: dict[str, Any], source: object) -> Precond:
    """The network without memory for its weights, on the meta device.

    Raises:
        SignFastError: arguments that the class does not take, or out of all proportion: they may be anybody's.
    """
    _check_proportion(kwargs, source)
    try:
        with torch.device("meta"):
            return CLASSES[cls](**kwargs)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise SignFastError(f"{source}: {first_line(error)}") from error


def _check_proportion(kwargs: dict[str, Any], source: object) -> None:
    """A network that would take hours to build is refused before."""
    limits = {"num_blocks": 100, "M": 100_000}
    for name, value in kwargs.items():
        many = isinstance(value, (list, tuple))
        values = value if many else [value]
        numbers = [v for v in values if isinstance(v, (int, float))]
        if many and len(numbers) < len(values):
            raise SignFastError(f"{source}: argument {name} must be a list of numbers")
        if len(values) > 100 or any(isinstance(v, int) and abs(v) > limits.get(name, 10**6) for v in numbers):
            raise SignFastError(f"{source}: argument {name} is out of all proportion: no such network was ever made")


def load_network(path_or_name: str | os.PathLike[str], device: str | torch.device | None = None) -> Precond:
    """See `sign_fast.models.load`."""
    place = find(path_or_name)
    target = resolve_device(device)
    config, net, state = read_network(place)
    net.load_state_dict(state, assign=True)
    net.facts = {name: config[name] for name in ("role", "sampling") if name in config}
    net = net.eval().requires_grad_(False)
    return net.to(target, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def read_network(place: Path, key: str | None = None) -> tuple[dict[str, Any], Precond, dict[str, Tensor]]:
    """config.json's content, the network on the meta device and its weights, float32 and checked, of what `find` found.

    Args:
        place: a network's folder, or a published snapshot.
        key: of a snapshot, the entry wanted; None means "ema".

    Raises:
        SignFastError: damaged, or the weights are not of the network that is described.
    """
    if place.is_file():
        snapshot = published.read_snapshot(place, key)
        net = build_meta(snapshot.cls, snapshot.kwargs, place)
        return _snapshot_config(snapshot), net, snapshot.state(net)
    config = read_config(place)
    state = read_weights(place / WEIGHTS)
    net = build_meta(config["cls"], config["kwargs"], place / CONFIG)
    check_state(state, net.state_dict(), place / WEIGHTS)
    return config, net, {name: value.float() for name, value in state.items()}


def _snapshot_config(snapshot: published.PublishedNetwork) -> dict[str, Any]:
    config = {"format": _FORMAT, "cls": snapshot.cls, "kwargs": snapshot.kwargs}
    return config if snapshot.role is None else {**config, "role": snapshot.role}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None means CUDA where there is one, else the CPU.

    Raises:
        SignFastError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SignFastError(f"device {device!r} is not a device: say cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SignFastError(f"device {chosen} is not here ({torch.cuda.device_count()} CUDA devices): say cpu")
    return chosen


def check_replaceable(folder: Path) -> None:
    """Whether a network may be written there.

    Raises:
        SignFastError: the folder holds other files than a network's, which would be lost, or is a file.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise SignFastError(f"{folder} is a file: name a folder to write to")
    held = sorted(entry.name for entry in folder.iterdir())
    others = [name for name in held if name not in NETWORK_FILES]
    if held and (others or CONFIG not in held):
        raise SignFastError(f"{folder} holds {_names(others or held)}: name an empty folder, a new one or a network's")


def save_network(
    folder: str | os.PathLike[str],
    state: dict[str, Tensor],
    cls: str,
    kwargs: dict[str, Any],
    *,
    card: str | None = None,
    **facts: Any,
) -> None:
    """Write a network's folder; an older one is replaced in one step.

    Args:
        folder: where to.
        state: its state_dict, written in float32.
        cls, kwargs: what builds it, e.g. "EDMPrecond" and its arguments.
        card: text of README.md (the model card), or None.
        facts: further entries of config.json, e.g. role="teacher".

    Raises:
        SignFastError: it cannot be written; nothing half-written is left.
    """
    config = {"format": _FORMAT, "cls": cls, "kwargs": kwargs, **facts}

    def fill(temporary: Path) -> None:
        tensors = {key: value.detach().cpu().float().contiguous() for key, value in state.items()}
        try:
            save_file(tensors, temporary / WEIGHTS)
        except SafetensorError as error:
            raise SignFastError(
                f"cannot write {folder}: {first_line(error)}: free some space or choose another"
            ) from error
        write_text(temporary / CONFIG, json.dumps(config, indent=1) + "\n")
        if card is not None:
            write_text(temporary / "README.md", card)

    replace_folder(Path(folder), fill)

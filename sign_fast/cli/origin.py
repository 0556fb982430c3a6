"""What made an image, told in its file, so that no run takes another's images for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SignFastError, short

_WEIGHTS = (".safetensors", ".pkl")
_READ = 1 << 16


def fingerprint(place: Path) -> str:
    """A hash of what is at a network's place: configurations, and of each file of weights its size and both ends.

    Args:
        place: a network's or pipeline's folder, or a snapshot's file.
    """
    digest = hashlib.sha256()
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    for file in files:
        if file.suffix.lower() in _WEIGHTS:
            with file.open("rb") as content:
                head, size = content.read(_READ), file.stat().st_size
                content.seek(max(0, size - _READ))
                data = b"%d " % size + head + content.read()
        elif file.name.endswith("config.json") or file.name == "model_index.json":
            data = file.read_bytes()
        else:
            continue
        digest.update(f"{file.relative_to(place)} {len(data)} ".encode() + data)
    return digest.hexdigest()[:16]


def origin(network: Path, **settings: Any) -> dict[str, Any]:
    """What makes an image besides its seed, as JSON holds it; settings that are None count as not given."""
    return {"network": fingerprint(network), **{name: value for name, value in settings.items() if value is not None}}


def note_of(origin: Mapping[str, Any]) -> str:
    """The note in the file of an image that was made so."""
    return json.dumps({"sign_fast": origin}, sort_keys=True)


def check_kept(path: Path, wanted: Mapping[str, Any]) -> None:
    """That an image which is there already was made as this run would make it.

    Raises:
        SignFastError: it was not, or its file does not tell; naming what differs.
    """
    found = _found(path)
    if found is None:
        raise SignFastError(
            f"{path} is there already and does not tell what made it: choose another --outdir, or remove it"
        )
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if not differing:
        return
    name = differing[0]
    if name == "network":
        what = "another network"
    else:
        was, now = (short(d[name]) if name in d else "none" for d in (found, wanted))
        what = f"{name} {was}, not {now}"
    raise SignFastError(f"{path} is there already, made with {what}: choose another --outdir, or remove it")


def is_generated(path: Path) -> bool:
    """Whether the file is an image of `sign-fast generate`."""
    return path.is_file() and _found(path) is not None


def _found(path: Path) -> dict[str, Any] | None:
    from ..sampling.pictures import read_note

    try:
        content = json.loads(read_note(path) or "null")
    except (ValueError, RecursionError):  # another program's note
        return None
    found = content.get("sign_fast") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None

"""The model card: README.md of a network's folder, written from the facts in its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .atomic import write_text
from .store import CONFIG, find, read_config


def model_card(name: str, config: dict[str, Any]) -> str:
    """Markdown from config.json's class, arguments, `trained` and `quality` entries."""
    trained, quality = config.get("trained", {}), config.get("quality", {})
    lines = [
        f"# {name}",
        "",
        f"A {config.get('role', 'network')} of `sign_fast` ({config['cls']}), float32 weights in `model.safetensors`.",
        "",
        "```json",
        json.dumps(config["kwargs"], indent=1),
        "```",
        "",
    ]
    if trained:
        lines += ["## How it was made", ""]
        lines += [f"- {key}: {_text(value)}" for key, value in trained.items()] + [""]
    if quality:
        lines += ["## Quality", ""]
        lines += [f"- {key}: {_text(value)}" for key, value in quality.items()] + [""]
    if trained.get("data") == "digits":
        lines += [
            "## Data and limits",
            "",
            "The 1,797 8×8 handwritten digits that scikit-learn ships (Alpaydin & Kaynak, Optical Recognition of",
            "Handwritten Digits, UCI 1998, CC BY 4.0), all of them, also those the quality is measured against: a",
            "demonstration and a test object, not a measure of generalisation.",
            "",
        ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value)


def record(folder: str | Path, **facts: Any) -> None:
    """Add facts to config.json (e.g. quality={…}) and write README.md anew.

    Raises:
        SignFastError: no network there, or it cannot be written.
    """
    path = find(folder)
    config = {**read_config(path), **facts}
    write_text(path / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    write_text(path / "README.md", model_card(path.name, config))

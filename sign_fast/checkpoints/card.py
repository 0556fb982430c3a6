"""The model card: README.md of a network's folder, written from the facts in its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .atomic import write_text
from .store import CONFIG, bundled_names, find, read_config

CURVES = "curves.png"

_DIGITS = {
    "digits": "all 1,797 of them, also those the quality is measured against",
    "digits:train": "1,438 of them; the Fréchet distance is to all 1,797, and 359 are held out to measure editing",
}

NO_DATA, SAMPLES = "none", "samples of the teacher"  # `data` of students that were trained without any


def model_card(name: str, config: dict[str, Any], curves: str | None = None) -> str:
    """Markdown from config.json's class, arguments, `trained` and `quality` entries.

    Args:
        name: title.
        config: of the folder.
        curves: file name of a picture of the training beside the card.
    """
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
    if curves:
        lines += ["## Training", "", f"![Losses and quality of the training]({curves})", ""]
    seen = _digits_seen(trained)
    if seen:
        lines += [
            "## Data and limits",
            "",
            "The 8×8 handwritten digits that scikit-learn ships (Alpaydin & Kaynak, Optical Recognition of",
            f"Handwritten Digits, UCI 1998, CC BY 4.0), {seen}: a",
            "demonstration and a test object, not a measure of generalisation.",
            "",
        ]
    return "\n".join(lines)


def _digits_seen(trained: dict[str, Any]) -> str | None:
    """Which of the digits a network was trained on; of a student without data, those that its teacher was."""
    data, teacher = trained.get("data"), trained.get("teacher")
    if data in (NO_DATA, SAMPLES) and teacher in bundled_names():
        # a folder of that name here may hold a network of other data
        seen = _DIGITS.get(read_config(find(teacher)).get("trained", {}).get("data"))
        return seen and f"{seen}, seen by its teacher alone"
    return _DIGITS.get(str(data))


def _text(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value)


def record(folder: str | Path, **facts: Any) -> None:
    """Add facts to config.json (e.g. quality={…}) and write README.md anew, with curves.png where it lies there.

    Raises:
        SignFastError: no network there, or it cannot be written.
    """
    path = find(folder)
    config = {**read_config(path), **facts}
    write_text(path / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    curves = CURVES if (path / CURVES).exists() else None
    write_text(path / "README.md", model_card(path.name, config, curves))

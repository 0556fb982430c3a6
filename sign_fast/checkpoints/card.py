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


def model_card(name: str, config: dict[str, Any], curves: str | None = None, *, hub: bool = False) -> str:
    """Markdown from config.json's class, arguments, `source`, `trained` and `quality` entries.

    Args:
        name: title.
        config: of the folder.
        curves: file name of a picture of the training beside the card.
        hub: begin with what the Hub reads (library, task, tags; the licence is for whoever publishes to add).
    """
    trained, quality = config.get("trained", {}), config.get("quality", {})
    lines = [
        *(_front_matter(config) if hub else ()),
        f"# {name}",
        "",
        f"A {config.get('role', 'network')} of `sign_fast` ({config['cls']}), float32 weights in `model.safetensors`.",
        "",
        "```json",
        json.dumps(config["kwargs"], indent=1),
        "```",
        "",
    ]
    if source := config.get("source"):
        lines += ["## Source", ""]
        lines += [f"- {key}: {_text(value)}" for key, value in source.items()]
        lines += ["", "The weights' licence is that of their source.", ""]
    if hub:
        lines += ["## Use", "", *_use(config), ""]
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


def _front_matter(config: dict[str, Any]) -> list[str]:
    tags = ["diffusion", "image-generation", "sign_fast"]
    if config.get("role") == "student":
        tags += ["distillation", "few-step"]
    return [
        "---",
        "library_name: sign_fast",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]


def _use(config: dict[str, Any]) -> list[str]:
    role = "" if config.get("role") else ', role="teacher"'  # from_pretrained takes what says no role for a student
    made = "ImageGenerator.from_pretrained(path)" if not role else f"ImageGenerator(models.load(path){role})"
    return [
        "```python",
        "from sign_fast import ImageGenerator" + (", models" if role else ""),
        "",
        'path = "…"  # this folder, or its name on the Hub',
        f"images = {made}(range(16))  # uint8 (16, H, W, C)",
        "```",
    ]


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
    hub = (path / "README.md").exists() and (path / "README.md").read_text(encoding="utf-8").startswith("---\n")
    write_text(path / "README.md", model_card(path.name, config, curves, hub=hub))

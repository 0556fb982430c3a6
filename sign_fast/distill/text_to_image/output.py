"""A student on disk: a pipeline's folder with its UNet and the teacher's other parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.atomic import explain_os_errors, replace_folder, write_text
from ...errors import SignFastError, first_line
from ...integrations.diffusers.loading import INDEX
from ...integrations.diffusers.parts import PARTS
from .networks import unet_state

_KEPT = {".json", ".txt", ".safetensors"}  # of a part's folder: settings, vocabularies, weights; no code, no pickle
_SHARD = "5GB"


def save_pipeline(
    folder: Path,
    teacher: Path,
    unet_class: Any,
    unet_config: Any,
    state: dict[str, Tensor],
    settings: dict[str, Any],
    card: str,
) -> None:
    """Write a `SiDPipeline` folder; an older one is replaced in one step.

    The teacher's other parts are copied and not linked: what later writes over a file of the folder, as safetensors 0.6
    does in place, must not change the teacher. Variants such as model.fp16.safetensors stay behind.

    Args:
        folder: where to.
        teacher: the folder of its pipeline.
        unet_class, unet_config: what builds the UNet.
        state: of the student as a `LatentNetwork`, on any device; float32 is written.
        settings: entries of model_index.json, such as "num_inference_steps".
        card: text of README.md.

    Raises:
        SignFastError: it cannot be written; nothing half-written is left.
    """

    def fill(temporary: Path) -> None:
        with explain_os_errors(folder):
            write(temporary)

    try:
        index = json.loads((teacher / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SignFastError(
            f"cannot read {teacher / INDEX} any more ({first_line(error)}): put the teacher back, whose parts go into "
            f"{folder}"
        ) from error

    def write(temporary: Path) -> None:
        kept = {name: index[name] for name in PARTS if isinstance(index.get(name), list) and index[name][0]}
        for name in kept:
            if name != "unet":
                _copy(teacher / name, temporary / name)
        with torch.device("meta"):
            unet = unet_class.from_config(unet_config)
        weights = {name: t.detach().cpu().float().contiguous() for name, t in unet_state(state).items()}
        unet.load_state_dict(weights, assign=True)
        try:
            unet.save_pretrained(temporary / "unet", safe_serialization=True, max_shard_size=_SHARD)
        except Exception as error:  # safetensors' own for a full disk among them
            raise SignFastError(
                f"cannot write {folder}: {first_line(error)}: free some space or choose another"
            ) from error
        carried = {n: v for n, v in index.items() if n == "force_zeros_for_empty_prompt"}
        head = {"_class_name": "SiDPipeline", "_diffusers_version": index.get("_diffusers_version")}
        write_text(temporary / INDEX, json.dumps({**head, **carried, **settings, **kept}, indent=2) + "\n")
        write_text(temporary / "README.md", card)

    replace_folder(folder, fill)


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        variant = path.suffix == ".safetensors" and "." in path.stem
        if path.suffix in _KEPT and path.is_file() and not variant:
            shutil.copyfile(path, target / path.name)


def card_of(title: str, trained: dict[str, Any], steps: int) -> str:
    """README.md: how the student was made and is called."""
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "", f"# {title}", ""]
    lines += [
        f"A text-to-image pipeline of {steps} step{'s' * (steps != 1)}, distilled by `sign_fast` (SiD). Its UNet is",
        "the average of the student's weights, float32; its other parts are the teacher's, under the teacher's terms.",
        "",
        "```python",
        "from sign_fast.integrations.diffusers import SiDPipeline",
        "",
        f'images = SiDPipeline.from_pretrained("{title}")("a prompt", num_inference_steps={steps}).images',
        "```",
        "",
        "## How it was made",
        "",
    ]
    lines += [f"- {name}: {f'`{value}`' if isinstance(value, str) else value}" for name, value in trained.items()]
    lines += ["", "No quality figure was measured in training.", ""]
    return "\n".join(lines)

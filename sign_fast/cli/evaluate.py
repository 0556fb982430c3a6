"""`sign-fast evaluate`: how good a generator's images are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import SignFastError

_SAMPLER_NAMES = {"edm": "Heun", "few_step": "few-step", "recursive": "recursive"}


@click.command()
@click.option("--network", help="Folder or bundled name of the generator.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder or zip of images, instead of --network.")
@click.option("--num", type=click.IntRange(min=2), default=2000, show_default=True, help="Images, seeds 0 to NUM-1.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: the network's own]")
@click.option("--batch", type=click.IntRange(min=1), default=250, show_default=True, help="Images a batch.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--record", is_flag=True, help="Write the result into the network's config.json and model card.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def evaluate(
    network: str | None,
    images: Path | None,
    num: int,
    steps: int | None,
    batch: int,
    device: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Fréchet distance of 8×8 digits to the 1,797 real ones, on 64 features of the bundled digits classifier.

    \b
    sign-fast evaluate --network digits-uncond
    sign-fast evaluate --images out
    """
    from ..metrics.digits_classifier import digits_distance

    if (network is None) == (images is None):
        raise SignFastError("give either --network or --images")
    if record and network is None:
        raise SignFastError("--record goes with --network")
    facts: dict[str, Any]
    if network is not None:
        pixels, facts = _generated(network, num, steps, batch, device)
    else:
        assert images is not None
        pixels, facts = _read(images)
    facts = {"Fréchet distance": round(digits_distance(pixels), 3), **facts}
    if record and network is not None:
        from ..checkpoints.card import record as write_card

        write_card(network, quality=facts)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else _line(facts))


def _line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _check_shape(shape: tuple[int, ...], source: object) -> None:
    if shape != (1, 8, 8):
        raise SignFastError(f"{source} gives {shape} images (C, H, W): this metric knows 8×8 grey digits only")


def _generated(network: str, num: int, steps: int | None, batch: int, device: str | None) -> tuple[Any, dict[str, Any]]:
    import numpy as np
    import torch
    from tqdm import tqdm

    from ..sampling import ImageGenerator

    generator = ImageGenerator.from_pretrained(network, device)
    _check_shape(generator.image_shape, network)
    steps = generator.default_steps if steps is None else steps
    batches = [range(start, min(start + batch, num)) for start in range(0, num, batch)]
    arrays = tqdm(generator.stream(batches, steps), total=len(batches), desc="generate", unit="batch")
    pixels = torch.from_numpy(np.concatenate(list(arrays))).permute(0, 3, 1, 2)
    facts = {"images": num, "seeds": f"0-{num - 1}", "steps": steps, "sampler": _SAMPLER_NAMES[generator.sampler]}
    return pixels, facts


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    import numpy as np
    import torch

    from ..data import open_dataset

    dataset = open_dataset(path)
    _check_shape(dataset.shape, path)
    stack = np.stack([dataset.image(i) for i in range(len(dataset))])
    if stack.dtype != np.uint8:
        raise SignFastError(f"{path} holds {stack.dtype} images: quality is of uint8 ones")
    return torch.from_numpy(stack), {"images": len(dataset)}

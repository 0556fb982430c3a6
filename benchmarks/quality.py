"""Fréchet distance of bundled networks beside their controls, in one table. Run with --help for the arguments.

    python benchmarks/quality.py
    python benchmarks/quality.py --network runs/digits-sid/best --blocks 1

A distance of 2,000 images swings with the seeds by more than students differ, so each row has several blocks of seeds:
the first is what the model cards tell, the mean says what to expect, and all blocks together come nearer to what is
left of a distance when there is no noise. Real images drawn with replacement are the best that a row can be.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.ledger import environment
from benchmarks.sign_evidence.arms import described
from benchmarks.sign_evidence.network import HEUN_STEPS
from benchmarks.sign_evidence.tables import Column, markdown
from sign_fast import functional
from sign_fast.checkpoints.atomic import write_text
from sign_fast.checkpoints.store import bundled_names, find, read_config, resolve_device
from sign_fast.data import open_dataset
from sign_fast.distill.pairs import network_hash
from sign_fast.errors import SignFastError, first_line
from sign_fast.metrics.digits_classifier import digits_distance
from sign_fast.models import load
from sign_fast.sampling import ImageGenerator
from sign_fast.sampling.noise import SeededNoise

RECURSIVE_STEPS = (1, 2, 3, 4)
COLUMNS: list[Column] = [
    ("network", "network", "{}"),
    ("weights", "weights", "{}"),
    ("steps", "steps", "{}"),
    ("network calls", "calls", "{}"),
    ("first block", "first", "{:.2f}"),
    ("mean of blocks", "mean", "{:.2f}"),
    ("lowest", "lowest", "{:.2f}"),
    ("highest", "highest", "{:.2f}"),
    ("all images at once", "all", "{:.2f}"),
]
BATCH = 500


def distances(images: list[Tensor]) -> dict[str, float]:
    """Of blocks of (N, 1, 8, 8) uint8 images."""
    found = [digits_distance(block) for block in images]
    return {
        "first": found[0],
        "mean": statistics.fmean(found),
        "lowest": min(found),
        "highest": max(found),
        "all": digits_distance(torch.cat(images)),
    }


def generated(generator: ImageGenerator, steps: int, blocks: int, num: int) -> list[Tensor]:
    """Blocks of images of consecutive seeds from 0, which draw their classes where there are any."""
    found = []
    for block in range(blocks):
        parts = []
        for start in range(block * num, (block + 1) * num, BATCH):
            seeds = range(start, min(start + BATCH, (block + 1) * num))
            parts.append(generator(seeds, steps).permute(0, 3, 1, 2).cpu())
        found.append(torch.cat(parts))
    return found


def _shown(name: str) -> str:
    """A network's name as it was given; of an absolute path, which other machines have not, the last two parts."""
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def rows_of(name: str, blocks: int, num: int) -> Iterator[dict[str, Any]]:
    """A network at each of its step counts: 18 and fewer Heun steps, the calls it was distilled for, or k = 1 … 4.

    "weights" begins the SHA-256 of what the network holds: the same name may hold another one later.

    Raises:
        SignFastError: it cannot be loaded, or does not make 8×8 digits.
    """
    config = read_config(find(name))
    generator = ImageGenerator.from_pretrained(name)
    if generator.image_shape != (1, 8, 8):
        raise SignFastError(f"{name} makes {generator.image_shape} images: features are bundled for (1, 8, 8) alone")
    weights = network_hash(load(name))[:12]
    if config.get("role") == "teacher":
        counts: tuple[int, ...] = HEUN_STEPS
    elif generator.sampler == "recursive":
        counts = RECURSIVE_STEPS
    else:
        counts = tuple(sorted({1, 2, generator.default_steps} if generator.default_steps > 1 else {1}))
    for steps in counts:
        calls = 2 * steps - 1 if config.get("role") == "teacher" else steps
        found = distances(generated(generator, steps, blocks, num))
        yield {"network": _shown(name), "weights": weights, "steps": steps, "calls": calls, **found}


def controls(blocks: int, num: int) -> Iterator[dict[str, Any]]:
    """What a distance is worth: the noise itself, one image, and the real images, drawn with replacement."""
    data = open_dataset("digits")
    real = torch.from_numpy(np.stack([data.image(i) for i in range(len(data))]))
    noise = [SeededNoise("cpu", range(block * num, (block + 1) * num)).randn((num, 1, 8, 8)) for block in range(blocks)]
    pictures = [functional.to_uint8(z).permute(0, 3, 1, 2) for z in noise]
    yield {"network": "identity: the noise itself", "calls": 0, **distances(pictures)}
    mean = real.float().mean(0, keepdim=True).round().to(torch.uint8)
    yield {"network": "constant: the mean image", "calls": 0, **distances([mean.expand(num, -1, -1, -1)] * blocks)}
    generator = torch.Generator().manual_seed(0)
    drawn = [real[torch.randint(len(real), (num,), generator=generator)] for _ in range(blocks)]
    yield {"network": "real images, drawn with replacement", "calls": 0, **distances(drawn)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--network", "networks", multiple=True, help="Folder or name, again for more.  [default: the bundled]")
@click.option("--blocks", type=click.IntRange(min=1), default=5, show_default=True, help="Of seeds.")
@click.option("--num", type=click.IntRange(min=2), default=2000, show_default=True, help="Images a block.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [default: PyTorch's]")
@click.option("--outdir", type=click.Path(path_type=Path), default="out/quality", show_default=True)
def quality(networks: tuple[str, ...], blocks: int, num: int, threads: int | None, outdir: Path) -> None:
    """Table of Fréchet distances of digits networks and controls: quality.md and quality.csv."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        rows = []
        for row in _all(networks or tuple(bundled_names()), blocks, num):
            rows.append(row)
            click.echo(f"{row['network']} {row.get('steps', '')}: {row['first']:.2f}, mean {row['mean']:.2f}", err=True)
    except (SignFastError, OSError) as error:
        click.echo(f"error: {first_line(error)}", err=True)
        sys.exit(1)
    facts = environment(str(resolve_device(None)))
    heading = (
        f"Fréchet distances, {blocks} blocks of {num:,} images of seeds from 0; real halves are 18 apart\n\n"
        f"{described(facts)}: `{facts['command']}`\n\n"
    )
    outdir.mkdir(parents=True, exist_ok=True)
    write_text(outdir / "quality.md", heading + (text := markdown(rows, COLUMNS)) + "\n")
    with open(outdir / "quality.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [key for _, key, _ in COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
    click.echo(heading + text)


def _all(networks: tuple[str, ...], blocks: int, num: int) -> Iterator[dict[str, Any]]:
    for name in networks:
        yield from rows_of(name, blocks, num)
    yield from controls(blocks, num)


if __name__ == "__main__":
    quality()

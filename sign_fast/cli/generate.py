"""`sign-fast generate`: images from seeds, with the published programs' options and file names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import click

from ..errors import SignFastError
from .origin import check_kept, note_of, origin
from .processes import device_for, process_group, this_process

_GRID_LIMIT = 1024
_ABLATION_OPTIONS = ["solver", "discretization", "schedule", "scaling"]


@click.command()
@click.option(
    "--network", required=True,
    help="Folder with config.json and model.safetensors, a bundled name, or a text-to-image pipeline's folder.",
)  # fmt: skip
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="Where the images go.")
@click.option("--seeds", default=None, metavar="LIST", help="Seeds, e.g. 0-63,70; one an image.  [default: 0-63]")
@click.option("--num", type=click.IntRange(min=1), help="The first NUM of the seeds; without --seeds, 0 to NUM-1.")
@click.option("--prompt", help="Text of all images (pipeline).")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts, one an image: a text file's lines or Parquet (pipeline).",
)
@click.option("--subdirs", is_flag=True, help="A folder for every 1000 seeds.")
@click.option("--class", "class_idx", type=int, help="Class label of all images.  [default: drawn from each seed]")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images a batch.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: teacher 18, student 1]")
@click.option("--sigma_min", type=click.FloatRange(min=0, min_open=True), help="Lowest noise level (teacher).")
@click.option("--sigma_max", type=click.FloatRange(min=0, min_open=True), help="Highest noise level (teacher).")
@click.option("--rho", type=click.FloatRange(min=0, min_open=True), help="Exponent of the time steps (teacher).")
@click.option("--S_churn", "S_churn", type=click.FloatRange(min=0), help="Strength of the churn (teacher).")
@click.option("--S_min", "S_min", type=click.FloatRange(min=0), help="Lowest noise level with churn (teacher).")
@click.option("--S_max", "S_max", type=click.FloatRange(min=0), help="Highest noise level with churn (teacher).")
@click.option("--S_noise", "S_noise", type=float, help="Inflation of the churn's noise (teacher).")
@click.option("--solver", type=click.Choice(["euler", "heun"]), help="Ablate the solver (teacher).")
@click.option(
    "--disc", "discretization", type=click.Choice(["vp", "ve", "iddpm", "edm"]), help="Ablate the time steps."
)
@click.option("--schedule", type=click.Choice(["vp", "ve", "linear"]), help="Ablate sigma(t).")
@click.option("--scaling", type=click.Choice(["vp", "none"]), help="Ablate s(t).")
@click.option("--sigma_G", "sigma_G", type=click.FloatRange(min=0, min_open=True), help="Input noise level (student).")
@click.option("--grid", type=click.Path(path_type=Path, dir_okay=False), help="Also write a grid picture (PNG).")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option(
    "--noise", type=click.Choice(["torch", "philox"]), default="torch", show_default=True,
    help="The published draws of each seed, or other draws that are made faster.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads that write PNG files.  [default: cores, at most 8]"
)
def generate(
    network: str,
    outdir: Path,
    seeds: str | None,
    num: int | None,
    prompt: str | None,
    prompts: Path | None,
    subdirs: bool,
    class_idx: int | None,
    batch: int,
    steps: int | None,
    grid: Path | None,
    device: str | None,
    dtype: str,
    noise: Literal["torch", "philox"],
    workers: int | None,
    sigma_G: float | None,
    **teacher: Any,
) -> None:
    """Generate one image a seed, as OUTDIR/SEED.png.

    Images that are there already are kept, so an interrupted run goes on where it stopped; each file tells what made
    it, and those of another network or other settings are refused. Under torchrun the batches are spread over the
    processes; the images are the same.

    \b
    sign-fast generate --network digits-uncond --outdir out --seeds 0-99 --grid out/grid.png
    torchrun --nproc-per-node 4 -m sign_fast.cli generate --network DIR --outdir out --seeds 0-49999 --subdirs
    sign-fast generate --network PIPELINE --outdir out --seeds 0-3 --steps 4 --prompt "a cat on a mat"
    """
    import torch

    from ..checkpoints.store import find
    from ..sampling import ImageGenerator
    from ..sampling.pictures import check_channels
    from .generate_text import TextGenerator, is_pipeline, read_texts

    process = this_process()
    where, precision = device_for(process, device), getattr(torch, dtype)
    generator: Any
    options: dict[str, Any]
    text_of: dict[int, str] = {}
    if is_pipeline(network):
        _refuse_for_pipelines({**teacher, "sigma_G": sigma_G, "class": class_idx}, noise)
        texts = read_texts(prompt, prompts, num)
        wanted = _seeds(seeds, num or (len(texts) if seeds is None else None), noise)
        generator, options = TextGenerator(network, where, precision, wanted, texts, steps), {}
        text_of = generator.text_of
        made = origin(Path(network), dtype=dtype, steps=generator.steps)
    else:
        if prompt is not None or prompts is not None:
            find(network)  # it says what is not there at all
            raise SignFastError(f"prompts go with a text-to-image pipeline's folder: {network} is none")
        wanted = _seeds(seeds, num, noise)
        generator = ImageGenerator.from_pretrained(network, where, precision, noise)
        sampler, given = _sampler(generator, sigma_G, teacher)
        options = {**given, "steps": steps, "labels": class_idx, "sampler": sampler}
        generator.check(wanted, **options)
        check_channels(generator.image_shape[0])
        told = {"steps": steps or generator.default_steps, "class": class_idx, "sampler": sampler}
        made = origin(find(network), dtype=dtype, noise=noise, **told, **given)
    with process_group(process, generator.device.type):
        _run(generator, options, wanted, outdir, subdirs, batch, workers or _cores(), process, made, text_of)
        if process.world > 1:
            torch.distributed.barrier()
        if grid is not None and process.first:
            _write_grid(grid, outdir, wanted, subdirs)


def _cores() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, here)


def _seeds(text: str | None, num: int | None, noise: Literal["torch", "philox"]) -> list[int]:
    from ..sampling.noise import check_seeds, parse_seeds

    if text is None:
        text = f"0-{(num or 64) - 1}"
    return check_seeds(parse_seeds(text)[:num], noise=noise)


def _refuse_for_pipelines(options: dict[str, Any], noise: str) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        names = ", ".join(f"--{'disc' if name == 'discretization' else name}" for name in given)
        raise SignFastError(f"{names} do not go with a text-to-image pipeline: leave them away")
    if noise != "torch":
        raise SignFastError(f"--noise {noise} does not go with a text-to-image pipeline: leave it away")


def _sampler(generator: Any, sigma_G: float | None, teacher: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The sampler's name and the options it takes; options of the other kind of network are refused."""
    given = {name: value for name, value in teacher.items() if value is not None}
    if sigma_G is None and generator.sampler == "edm":
        return ("ablation" if any(name in given for name in _ABLATION_OPTIONS) else "edm"), given
    if given:
        names = ", ".join(f"--{'disc' if name == 'discretization' else name}" for name in given)
        raise SignFastError(
            f"only a teacher's sampler takes {names}, and this is a one- or few-step student: leave them away"
        )
    if sigma_G is None:
        return generator.sampler, {}
    if generator.sampler == "recursive":
        raise SignFastError("--sigma_G is the input noise level of a student: this one takes none, leave it away")
    return "few_step", {"sigma": sigma_G}


def _run(
    generator: Any,
    options: dict[str, Any],
    seeds: list[int],
    outdir: Path,
    subdirs: bool,
    batch: int,
    workers: int,
    process: Any,
    made: dict[str, Any],
    text_of: dict[int, str],
) -> None:
    from tqdm import tqdm

    from ..checkpoints.atomic import make_folder
    from ..sampling.pictures import PngWriter, image_path

    # batches are cut before they are spread, so that an image's batch, and with it its rounding, is always the same
    batches = [seeds[i : i + batch] for i in range(0, len(seeds), batch)][process.rank :: process.world]

    def origin_of(seed: int) -> dict[str, Any]:
        return {**made, "prompt": text_of[seed]} if seed in text_of else made

    missing = {}
    for seed in (seed for part in batches for seed in part):
        path = image_path(outdir, seed, subdirs)
        if path.exists():
            check_kept(path, origin_of(seed))
        else:
            missing[seed] = path
    for folder in sorted({outdir, *(path.parent for path in missing.values())}):
        make_folder(folder)
    total = sum(map(len, batches))
    kept = total - len(missing)
    batches = [part for part in batches if any(seed in missing for seed in part)]
    with (
        tqdm(total=total, initial=kept, unit="image", desc="generate", disable=not process.first) as bar,
        PngWriter(workers, bar.update) as writer,
    ):
        arrays = generator.stream(batches, **options) if batches else ()
        for part, images in zip(batches, arrays, strict=True):
            for seed, image in zip(part, images, strict=True):
                if seed in missing:
                    writer.save(missing[seed], image, note_of(origin_of(seed)))
    if process.first:
        note = f" ({kept} were there already)" if kept else ""
        click.echo(f"{len(seeds)} images in {outdir}{note if process.world == 1 else ''}")


def _write_grid(grid: Path, outdir: Path, seeds: list[int], subdirs: bool) -> None:
    from ..sampling.pictures import image_path, read_png, save_grid

    shown = seeds[:_GRID_LIMIT]
    save_grid(grid, [read_png(image_path(outdir, seed, subdirs)) for seed in shown])
    click.echo(f"grid of {len(shown)} in {grid}")

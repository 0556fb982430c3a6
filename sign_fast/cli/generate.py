"""`sign-fast generate`: images from seeds, with the published programs' options and file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import SignFastError
from .processes import device_for, process_group, this_process

_GRID_LIMIT = 1024
_ABLATION_OPTIONS = ["solver", "discretization", "schedule", "scaling"]


@click.command()
@click.option("--network", required=True, help="Folder with config.json and model.safetensors, or a bundled name.")
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="Where the images go.")
@click.option("--seeds", default=None, metavar="LIST", help="Seeds, e.g. 0-63,70; one an image.  [default: 0-63]")
@click.option("--num", type=click.IntRange(min=1), help="The first NUM of the seeds; without --seeds, 0 to NUM-1.")
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
def generate(
    network: str,
    outdir: Path,
    seeds: str | None,
    num: int | None,
    subdirs: bool,
    class_idx: int | None,
    batch: int,
    steps: int | None,
    grid: Path | None,
    device: str | None,
    dtype: str,
    sigma_G: float | None,
    **teacher: Any,
) -> None:
    """Generate one image a seed, as OUTDIR/SEED.png.

    Images that are there already are kept, so an interrupted run goes on where it stopped. Under torchrun the batches
    are spread over the processes; the images are the same.

    \b
    sign-fast generate --network digits-uncond --outdir out --seeds 0-99 --grid out/grid.png
    torchrun --nproc-per-node 4 -m sign_fast.cli generate --network DIR --outdir out --seeds 0-49999 --subdirs
    """
    import torch

    from ..sampling import ImageGenerator

    wanted = _seeds(seeds, num)
    process = this_process()
    generator = ImageGenerator.from_pretrained(network, device_for(process, device), getattr(torch, dtype))
    sampler, options = _sampler(generator.role, sigma_G, teacher)
    if class_idx is not None:
        _check_class(class_idx, generator.net.label_dim)
    with process_group(process, generator.device.type):
        _run(generator, wanted, outdir, subdirs, batch, steps, class_idx, sampler, options, process)
        if process.world > 1:
            torch.distributed.barrier()
        if grid is not None and process.first:
            _write_grid(grid, outdir, wanted, subdirs)


def _seeds(text: str | None, num: int | None) -> list[int]:
    from ..sampling import parse_seeds

    if text is None:
        return list(range(64 if num is None else num))
    return parse_seeds(text)[:num]


def _check_class(number: int, label_dim: int) -> None:
    if label_dim == 0:
        raise SignFastError("this network is unconditional: leave --class away")
    if not 0 <= number < label_dim:
        raise SignFastError(f"--class {number} is out of range: this network has classes 0 to {label_dim - 1}")


def _sampler(role: str, sigma_G: float | None, teacher: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The sampler's name and the options it takes; options of the other kind of network are refused."""
    given = {name: value for name, value in teacher.items() if value is not None}
    if sigma_G is not None or role == "student":
        if given:
            names = ", ".join(f"--{'disc' if name == 'discretization' else name}" for name in given)
            raise SignFastError(
                f"{names} go with a teacher's sampler, not with a one- or few-step student: leave them away"
            )
        return "few_step", {} if sigma_G is None else {"sigma": sigma_G}
    return ("ablation" if any(name in given for name in _ABLATION_OPTIONS) else "edm"), given


def _run(
    generator: Any,
    seeds: list[int],
    outdir: Path,
    subdirs: bool,
    batch: int,
    steps: int | None,
    class_idx: int | None,
    sampler: str,
    options: dict[str, Any],
    process: Any,
) -> None:
    from tqdm import tqdm

    from ..checkpoints.atomic import make_folder
    from ..sampling.pictures import image_path, save_png

    make_folder(outdir)
    # batches are cut before they are spread, so that an image's batch, and with it its rounding, is always the same
    batches = [seeds[i : i + batch] for i in range(0, len(seeds), batch)][process.rank :: process.world]
    total = sum(map(len, batches))
    kept = 0
    with tqdm(total=total, unit="image", desc="generate", disable=not process.first) as bar:
        for part in batches:
            missing = [i for i, seed in enumerate(part) if not image_path(outdir, seed, subdirs).exists()]
            kept += len(part) - len(missing)
            if missing:
                images = generator(part, steps, class_idx, sampler, **options).cpu().numpy()
                for i in missing:
                    path = image_path(outdir, part[i], subdirs)
                    if subdirs:
                        make_folder(path.parent)
                    save_png(path, images[i])
            bar.update(len(part))
    if process.first:
        note = f" ({kept} were there already)" if kept else ""
        click.echo(f"{len(seeds)} images in {outdir}{note if process.world == 1 else ''}")


def _write_grid(grid: Path, outdir: Path, seeds: list[int], subdirs: bool) -> None:
    from ..sampling.pictures import image_path, read_png, save_grid

    shown = seeds[:_GRID_LIMIT]
    save_grid(grid, [read_png(image_path(outdir, seed, subdirs)) for seed in shown])
    click.echo(f"grid of {len(shown)} in {grid}")

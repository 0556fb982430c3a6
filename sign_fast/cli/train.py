"""`sign-fast train`: teachers, with EDM's losses."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from ..errors import SignFastError
from .processes import accumulation, device_for, process_group, this_process

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
}
_PRECONDITIONERS = {"edm": ("EDMPrecond", "edm"), "vp": ("VPPrecond", "vp"), "ve": ("VEPrecond", "ve")}


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 1 such as 1,2,2")
    return numbers


@click.command()
@click.option("--data", required=True, help="'digits', 'digits:train', or a folder or zip of images.")
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="Of the run; an unfinished one goes on.")
@click.option("--preset", help="Network and settings by name, e.g. digits-uncond; sign-fast info lists the names.")
@click.option("--arch", type=click.Choice(list(_ARCHITECTURES)), help="Network without a preset.  [default: ddpmpp]")
@click.option("--precond", type=click.Choice(list(_PRECONDITIONERS)), help="Preconditioning and loss.  [default: edm]")
@click.option("--cond", is_flag=True, help="Class-conditional, with --arch.")
@click.option("--cbase", type=click.IntRange(min=8), help="Channels at the base, with --arch.")
@click.option("--cres", callback=_numbers, metavar="LIST", help="Channels of each level over cbase, with --arch.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="Of the blocks.")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), help="Length in millions of images.")
@click.option("--batch", type=click.IntRange(min=1), help="Images a step, over all processes.")
@click.option("--batch-gpu", type=click.IntRange(min=1), help="At most this many images at a time in a process.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Adam's learning rate.")
@click.option("--lr-schedule", type=click.Choice(["constant", "cosine"]), help="After the ramp-up.")
@click.option("--lr-rampup", type=click.FloatRange(min=0), help="Ramp-up in millions of images.")
@click.option("--ema", type=click.FloatRange(min=0), help="Half-life of the weights' average in millions of images.")
@click.option("--xflip/--no-xflip", default=None, help="Mirror half of the images.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the inner network.  [default: fp32]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--log-every", type=click.IntRange(min=1), help="Iterations between log rows.")
@click.option("--snap-every", "save_every", type=click.IntRange(min=1), help="Iterations between checkpoints.")
@click.option("--keep", type=click.IntRange(min=1), help="Checkpoints kept.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
def train(data: str, outdir: Path, device: str | None, **options: Any) -> None:
    """Train a denoising teacher (EDM); run the same command again to go on after an interruption.

    The run's folder holds metrics.csv, TensorBoard logs, resumable states and network/, the averaged weights.

    \b
    sign-fast train --data digits --preset digits-uncond --outdir runs/digits
    torchrun --nproc-per-node 8 -m sign_fast.cli train --data cifar10.zip --preset cifar10-cond-vp --outdir runs/cifar
    """
    from tqdm import tqdm

    from ..checkpoints.store import resolve_device
    from ..training.loop import Progress, Trainer

    process = this_process()
    chosen = resolve_device(device_for(process, device))
    settings = _settings(data, options, process.world)
    command = "sign-fast " + " ".join(sys.argv[1:])
    with process_group(process, chosen.type):
        trainer = Trainer(settings, outdir, chosen, command=command)
        start = trainer.iteration
        with tqdm(
            total=settings.iterations, initial=start, unit="it", desc="train", disable=not process.first, smoothing=0.05
        ) as bar:

            def report(progress: Progress) -> None:
                bar.update(progress.iteration - bar.n)
                bar.set_postfix({name: f"{progress.values[name]:.4g}" for name in ("kimg", "loss")})

            trainer.run(report)
        if process.first:
            if trainer.log_note:
                click.echo(trainer.log_note, err=True)
            click.echo(f"trained to {settings.iterations} iterations: {outdir / 'network'}")


def _settings(data: str, options: dict[str, Any], world: int) -> Any:
    from ..models.presets import preset
    from ..training.loop import TrainSettings

    given = {name: value for name, value in options.items() if value is not None}
    fixed = [name for name in ("arch", "precond", "cbase", "cres") if name in given] + ["cond"] * given["cond"]
    if "preset" in given and fixed:
        raise SignFastError(f"--preset already says --{fixed[0]}: leave one of them away")
    recipe: dict[str, Any] = {}
    if "preset" in given:
        cls, kwargs = preset(given["preset"])
        loss = "edm"
        recipe = json.loads(files("sign_fast.training").joinpath("recipes.json").read_text()).get(given["preset"], {})
    else:
        cls, kwargs, loss = _network(data, given)
    if "dropout" in given:
        kwargs["dropout"] = given["dropout"]
    names = {"batch", "lr", "lr_schedule", "xflip", "precision", "seed", "log_every", "save_every", "keep"}
    changed = {name: given[name] for name in names if name in given}
    millions = {"duration": "kimg", "ema": "ema_halflife_kimg", "lr_rampup": "lr_rampup_kimg"}
    changed |= {field: given[name] * 1000 for name, field in millions.items() if name in given}
    settings = TrainSettings(data, cls, kwargs, loss=loss, **{**recipe, **changed})
    if "batch_gpu" in given:
        parts = accumulation(settings.batch, given["batch_gpu"], world)
        settings = dataclasses.replace(settings, accumulation=parts)
    return settings


def _network(data: str, given: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    from ..data import open_dataset

    dataset = open_dataset(data)
    if given["cond"] and not dataset.num_classes:
        raise SignFastError(f"{data} has no labels: add a dataset.json, or leave --cond away")
    cls, loss = _PRECONDITIONERS[given.get("precond", "edm")]
    kwargs = {
        "img_resolution": dataset.shape[1],
        "img_channels": dataset.shape[0],
        "label_dim": dataset.num_classes if given["cond"] else 0,
        **_ARCHITECTURES[given.get("arch", "ddpmpp")],
    }
    if "cbase" in given:
        kwargs["model_channels"] = given["cbase"]
    if "cres" in given:
        kwargs["channel_mult"] = given["cres"]
    levels = len(kwargs["channel_mult"])
    if dataset.shape[1] % 2 ** (levels - 1):
        raise SignFastError(
            f"images of {dataset.shape[1]} pixels cannot be halved {levels - 1} times: give a shorter --cres"
        )
    return cls, kwargs, loss


@click.command()
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="For classifier, statistics and report.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def train_digits_classifier(outdir: Path, seed: int) -> None:
    """Train the small classifier whose features measure digits (the bundled one: seed 0)."""
    from ..metrics.digits_classifier import train as train_classifier

    report = train_classifier(outdir, seed)
    click.echo(
        f"held-out accuracy {report.held_out_accuracy:.4f}, median distance of two halves {report.halves_apart:.4f} "
        f"before scaling: {outdir}"
    )

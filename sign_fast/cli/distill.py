"""`sign-fast distill`: one- and few-step students from a teacher."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SignFastError
from .processes import Process, accumulation, device_for, process_group, this_process

if TYPE_CHECKING:
    from ..distill.run_settings import RunSettings

_MILLIONS = {
    "duration": "kimg",
    "ema": "ema_halflife_kimg",
    "lr_rampup": "lr_rampup_kimg",
    "idem_ramp": "idem_ramp_kimg",
    "student_after": "student_kimg",
    "adversarial_after": "adversarial_kimg",
}
_SID = ("steps", "tmin", "tmax", "sigma_init")
_ONLY = {  # what not every method reads
    "sid": _SID,
    "sida": (*_SID, "data", "xflip", "adversarial_weight", "adversarial_kimg", "student_kimg"),
    "sign": ("data", "xflip", "held_out", "rec", "idem", "flow", "dmd", "den", "matching", "idem_ramp_kimg"),
    "sid-latent": (
        *("steps", "data", "adversarial_weight", "adversarial_kimg", "student_kimg", "prompts", "prompt_column"),
        *("guidance", "guidance_scale", "noise_type", "flow_weight", "resolution"),
        *("fake_lora", "accelerate", "samples", "cache"),
    ),
}
_OF_DENOISERS = ("update", "dropout", "reg", "pairs", "capture", "quality_images")  # what sid-latent does not read
_OF_THE_FAKE_SCORE = ("den", "fake_updates", "fake_lr", "fake_betas", "fake_scale")


@click.command()
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="Of the run; an unfinished one goes on.")
@click.option("--recipe", help="Settings by name, e.g. digits-sid; other options go over them.")
@click.option(
    "--method",
    type=click.Choice(["sid", "sida", "sign", "sid-latent"]),
    help="SiD, SiDA (real images too), SIGN, or SiD of a text-to-image pipeline.",
)
@click.option("--teacher", help="Folder or bundled name of the denoiser; folder of a diffusers pipeline.")
@click.option(
    "--data",
    help="'digits:train', or a folder or zip of images; sign without takes the teacher's samples; sid-latent: a folder "
    "of images with captions, for an adversarial loss.",
)
@click.option("--prompts", help="Of sid-latent: file of prompts, one a line, or .parquet.")
@click.option("--prompt-column", help="Of the .parquet.  [default: prompt, text or caption]")
@click.option(
    "--guidance",
    type=click.Choice(["none", "lsg", "lsg-4.5", "zero-cfg", "anti-cfg"]),
    help="κ1 … κ4 by name.  [default: none]",
)
@click.option("--guidance-scale", type=float, help="κ1 to κ3 of anti-cfg, negative.")
@click.option("--noise-type", type=click.Choice(["fresh", "fixed", "ddim"]), help="Of the student's calls after one.")
@click.option(
    "--flow-weight",
    type=click.Choice(["1/omega", "1-t", "(1-t)/t", "((1-t)/t)^2"]),
    help="Of a flow's student loss.  [default: 1-t]",
)
@click.option("--resolution", type=int, help="Of the images in pixels.  [default: the teacher's]")
@click.option("--fake-lora", type=int, help="Rank of adapters on the teacher in place of a fake score of its own.")
@click.option("--accelerate", is_flag=True, default=None, help="The pipeline's UNets on sign_fast's operations.")
@click.option("--samples", type=int, help="Images of a check of sid-latent.  [default: 16]")
@click.option("--cache", help="Folder of embeddings and latents, for several runs.  [default: cache/ of the run's]")
@click.option("--steps", type=int, help="K of few-step SiD.  [default: 1]")
@click.option("--update", type=click.Choice(["alternating", "combined"]), help="As published, or both losses at once.")
@click.option("--duration", type=float, help="Length in millions of images.")
@click.option("--batch", type=int, help="Images a step, over all processes.")
@click.option("--batch-gpu", type=click.IntRange(min=1), help="At most this many images at a time in a process.")
@click.option("--lr", type=float, help="Adam's learning rate, of the student.")
@click.option("--fake-lr", type=float, help="Of the fake score.  [default: --lr]")
@click.option("--lr-schedule", type=click.Choice(["constant", "cosine"]), help="After the ramp-up.")
@click.option("--lr-rampup", type=float, help="Ramp-up in millions of images.")
@click.option("--beta1", type=float, help="Adam's, of the student.")
@click.option("--fake-beta1", type=float, help="Of the fake score.")
@click.option("--ema", type=float, help="Half-life of the student's average in millions of images.")
@click.option("--dropout", type=float, help="Of student and fake score.  [default: the teacher's]")
@click.option("--alpha", type=float, help="α of SiD's loss.")
@click.option("--tmin", type=float, help="Smallest time of SiD's noise levels, of 1000.")
@click.option("--tmax", type=float, help="Largest.")
@click.option("--sigma_G", "sigma_init", type=float, help="Noise level of SiD's student input.  [default: 2.5]")
@click.option("--ls", "fake_scale", type=float, help="Factor of the fake score's loss.")
@click.option("--lsg", "student_scale", type=float, help="Factor of the student's loss.")
@click.option(
    "--lsg-gan", "adversarial_weight", type=float, help="Factor of the adversarial loss, of sida or of sid-latent."
)
@click.option(
    "--adversarial-after",
    type=float,
    help="When that loss sets in, in millions of images.  [default: 0.2, of sid-latent 0]",
)
@click.option(
    "--student-after",
    type=float,
    help="When the student starts to move, where there is that loss.  [default: 0.1, of sid-latent 0]",
)
@click.option("--rec", type=float, help="Weight of SIGN's reconstruction; 0 leaves a term away.")
@click.option("--idem", type=float, help="Of idempotence.")
@click.option("--idem-ramp", type=float, help="Over which --idem rises from 0, in millions of images.")
@click.option("--flow", type=float, help="Of consistency along the teacher's flow.")
@click.option("--dmd", type=float, help="Of distribution matching.")
@click.option("--matching", type=click.Choice(["dmd", "sid"]), help="Which loss matches distributions.")
@click.option("--reg", type=float, help="Of regression on the teacher's pairs, with every method.")
@click.option("--pairs", type=int, help="Teacher pairs made, for --reg or for want of --data.")
@click.option("--den", type=float, help="Of the fake score's denoising loss.")
@click.option("--fake-updates", type=int, help="Of the fake score, for one of the student.")
@click.option("--xflip/--no-xflip", default=None, help="Mirror half of the real images.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the inner networks.")
@click.option("--parallel", type=click.Choice(["ddp", "fsdp"]), help="FSDP2 for networks beyond one device.")
@click.option("--checkpointing", is_flag=True, default=None, help="Recompute activations, for memory.")
@click.option("--cuda-graph/--no-cuda-graph", "capture", default=None, help="Capture the whole iteration.")
@click.option("--seed", type=int, help="Of every draw.  [default: 0]")
@click.option("--log-every", type=int, help="Iterations between log rows.")
@click.option("--snap-every", "save_every", type=int, help="Iterations between checkpoints.")
@click.option("--keep", type=int, help="Checkpoints kept.")
@click.option("--quality-every", type=int, help="Iterations between quality checks.")
@click.option("--quality-images", type=int, help="Images of a quality check.")
@click.option("--held-out", help="Data set that SIGN's reconstruction is measured on.")
@click.option("--stop-factor", type=float, help="Stop where quality is so many times worse than its best; inf: never.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--dry-run", is_flag=True, help="Check everything, print the settings, and train nothing.")
def distill(
    outdir: Path,
    recipe: str | None,
    batch_gpu: int | None,
    beta1: float | None,
    fake_beta1: float | None,
    device: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Distil a teacher into a one- or few-step student; run the same command again to go on after an interruption.

    The run's folder holds metrics.csv, quality.csv, curves.png, sample grids, TensorBoard logs, resumable states,
    network/, the student's averaged weights, and best/, those of the best quality.

    \b
    sign-fast distill --recipe digits-sid --outdir runs/digits-sid
    sign-fast distill --method sign --teacher digits-uncond --outdir runs/sign --batch 128 --lr 1e-3 --duration 0.2
    sign-fast distill --method sid-latent --teacher PIPELINE --prompts FILE --guidance lsg --outdir runs/text
    torchrun --nproc-per-node 8 -m sign_fast.cli distill --recipe cifar10-uncond --teacher DIR --outdir runs/cifar
    """
    from ..checkpoints.store import resolve_device
    from ..distill.recipes import method_of, settings_from

    process = this_process()
    given = {_MILLIONS.get(name, name): value for name, value in options.items() if value is not None}
    given |= {field: options[name] * 1000 for name, field in _MILLIONS.items() if options[name] is not None}
    given |= {name: (beta, 0.999) for name, beta in (("betas", beta1), ("fake_betas", fake_beta1)) if beta is not None}
    _check_method(method_of(recipe, given.get("method")), given)
    settings = settings_from(recipe, **given)
    _check_options(settings, given)
    if batch_gpu is not None:
        parts = accumulation(settings.batch, batch_gpu, process.world)
        settings = settings_from(recipe, **given, accumulation=parts)
    chosen = resolve_device(device_for(process, device))
    with process_group(process, chosen.type):
        _run(settings, outdir, chosen, process, dry_run)


def _check_method(method: str, given: dict[str, Any]) -> None:
    """Refuse what the method does not read."""
    goes_with = {name: f"--method {other}" for other in reversed(_ONLY) for name in _ONLY[other]}
    goes_with |= dict.fromkeys(_OF_DENOISERS, "--method sid") if method == "sid-latent" else {}
    _refuse(
        given, {name: f"{words}, not with {method}" for name, words in goes_with.items() if name not in _ONLY[method]}
    )


def _check_options(settings: Any, given: dict[str, Any]) -> None:
    """Refuse what was given, beside a recipe or without, and would not be read."""
    s = settings
    found: dict[str, str] = {}
    if s.method == "sid-latent":
        if s.data is None:
            found |= dict.fromkeys(("adversarial_weight", "adversarial_kimg", "student_kimg"), "--data")
        if s.guidance != "anti-cfg":
            found["guidance_scale"] = "--guidance anti-cfg"
        if s.steps == 1:
            found["noise_type"] = "--steps above 1"
        _refuse(given, found)
        return
    if s.method == "sign":
        if not s.idem:
            found["idem_ramp_kimg"] = "--idem above 0"
        if s.matching != "sid":
            found["alpha"] = "--matching sid"
        if not s.trains_fake_score:
            found |= dict.fromkeys(("alpha", "matching", *_OF_THE_FAKE_SCORE), "--dmd above 0")
        if s.data is None and s.xflip:
            found["xflip"] = "--data"
    if not s.needs_pairs:
        found["pairs"] = "--reg above 0"
    _refuse(given, found)


def _refuse(given: dict[str, Any], found: dict[str, str]) -> None:
    """One line about the first option given that is found to go with something else."""
    options = {_MILLIONS.get(str(p.name), str(p.name)): p.opts[0] for p in distill.params}
    options |= {"betas": "--beta1", "fake_betas": "--fake-beta1"}
    for name in given:
        if name in found:
            raise SignFastError(f"{options[name]} goes with {found[name]}: leave it away")


def _distiller(settings: RunSettings, outdir: Path | None, device: Any, process: Process, command: str) -> Any:
    """The run of the method."""
    if settings.method != "sid-latent":
        from ..distill.trainer import Distiller

        return Distiller(settings, outdir, device, command=command)  # type: ignore[arg-type]
    from ..distill.text_to_image.trainer import TextDistiller
    from ..integrations.diffusers.versions import require_diffusers

    require_diffusers().utils.logging.disable_progress_bar()  # this process's: bars of files that are read at once
    with suppress(ImportError):
        import transformers

        transformers.utils.logging.disable_progress_bar()
    return TextDistiller(settings, outdir, device, command, _Bars(process))  # type: ignore[arg-type]


class _Bars:
    """Progress of what a run makes before its first iteration, a bar each."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._bar: Any = None

    def __call__(self, what: str, rows: int, of: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=-(-of // self._process.world), desc=what, disable=not self._process.first)
        self._bar.total = max(self._bar.total, rows)
        self._bar.update(rows - self._bar.n)
        if rows >= self._bar.total:
            self._bar.close()
            self._bar = None


def _run(settings: RunSettings, outdir: Path, device: Any, process: Process, dry_run: bool) -> None:
    from tqdm import tqdm

    from ..distill.run_settings import plain
    from ..training.loop import Progress

    command = "sign-fast " + " ".join(sys.argv[1:])
    run = _distiller(settings, None if dry_run else outdir, device, process, command)
    settings = run.settings
    before = len(run.notes)
    _tell(process, run.notes)
    if dry_run:
        if process.first:
            click.echo(json.dumps({**plain(settings), "iterations": settings.iterations}, indent=1))
        return
    with tqdm(
        total=settings.iterations,
        initial=run.iteration,
        unit="it",
        desc="distill",
        disable=not process.first,
        smoothing=0.05,
    ) as bar:
        shown: dict[str, str] = {}

        def report(progress: Progress) -> None:
            bar.update(progress.iteration - bar.n)
            kept = {name: value for name, value in progress.values.items() if name.startswith(("loss", "quality"))}
            shown.update({name: f"{value:.4g}" for name, value in kept.items()})
            bar.set_postfix(shown)

        run.run(report)
    _tell(process, run.notes[before:])
    if process.first:
        best = run.guard
        kept = best.best is not None and (outdir / "best").exists()
        told = f"; best {best.best:.4g} at {best.best_iteration}: {outdir / 'best'}" if kept else ""
        click.echo(f"distilled to {settings.iterations} iterations: {outdir / 'network'}{told}")


def _tell(process: Process, notes: list[str]) -> None:
    if process.first:
        for note in notes:
            click.echo(note, err=True)

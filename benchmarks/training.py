"""How long is an iteration of distillation, against the published loop in ordinary PyTorch? See --help.

Every provider trains from the same teacher at the same batch. First the library's iterations are compared with ordinary
autograd's; then each provider's memory is measured, on a CPU in a fresh process; then they take turns, so that drift of
the machine hits all alike. Medians are reported. A fresh process's memory is all that it holds: Python and torch too,
and, the plain loop included, the library's networks, which are what the loop copies; the trainer only where it trains.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

from sign_fast.errors import SignFastError, first_line

UPDATES = {
    "alternating": ("sign_fast",),
    "combined": ("sign_fast_combined",),
    "both": ("sign_fast", "sign_fast_combined"),
}
WARM_UP = 3  # iterations: the second one finds other gradients and modes than the first
SECONDS, QUICK_SECONDS = 60.0, 5.0
_BATCHES = {"digits": 128}  # by the first word of the preset; else 32, a GPU's share of a published run


def _batch(preset: str) -> int:
    return _BATCHES.get(Path(preset).name.split("-")[0], 32)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--preset", default="digits-uncond", show_default=True, help="Teacher: preset, bundled name or folder.")
@click.option("--method", type=click.Choice(["sid"]), default="sid", show_default=True)
@click.option("--update", type=click.Choice(list(UPDATES)), default="both", show_default=True, help="The trainer's.")
@click.option("--batch", type=click.IntRange(min=1), help="Images an iteration.  [default: digits 128, else 32]")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [default: PyTorch's]")
@click.option("--providers", help="[default: plain, on CUDA compile, and --update's]  Also known: plain_no_tf32.")
@click.option("--seconds", type=click.FloatRange(min=0), help="Of timing.  [default: 60, with --quick 5]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and draws.")
@click.option("--outdir", type=click.Path(path_type=Path), default="out/training", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report, not the table.")
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), help="CSV file to append to.")
@click.option("--no-ledger", is_flag=True, help="Append nowhere.")
@click.option("--no-memory", is_flag=True, help="Measure no memory.")
@click.option(
    "--warm-up-timeout",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds that a provider may take to compile and for its first iterations.",
)
@click.option("--quick", is_flag=True, help="Under a minute; appends to no ledger unless one is named.")
def training(
    preset: str,
    method: str,
    update: str,
    batch: int | None,
    precision: str,
    device: str | None,
    threads: int | None,
    providers: str | None,
    seconds: float | None,
    seed: int,
    outdir: Path,
    as_json: bool,
    ledger: Path | None,
    no_ledger: bool,
    no_memory: bool,
    warm_up_timeout: float,
    quick: bool,
) -> None:
    """Seconds an iteration of distillation, by provider."""
    if threads is not None:  # before torch is imported; child processes take it over
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    from benchmarks import ledger as book
    from benchmarks.providers import Case, describe_weights
    from benchmarks.training_comparison import compare
    from benchmarks.training_providers import PROVIDERS, TrainingCase, teacher_of
    from sign_fast.checkpoints.atomic import make_folder, write_text
    from sign_fast.checkpoints.store import resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    where = str(resolve_device(device))
    default = ["plain", *(["compile"] if where.startswith("cuda") else []), *UPDATES[update]]
    names = list(dict.fromkeys(providers.split(","))) if providers else default
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise SignFastError(f"unknown provider {unknown[0]!r}: known: {', '.join(PROVIDERS)}")
    target = ledger if ledger is not None else None if no_ledger or quick else book.DEFAULT
    make_folder(outdir)
    facts = {
        **book.environment(where),
        "mode": "training",
        "preset": preset,
        "weights": describe_weights(Case(preset, "few_step", 1, "float32", where)),
        "method": method,
        "steps": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        teacher = teacher_of(preset, Path(folder) / "teacher", seed)
        case = TrainingCase(teacher, batch or _batch(preset), precision, where, seed, method=method)
        rows = compare(
            case,
            names,
            seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS,
            warm_up=WARM_UP,
            timeout=warm_up_timeout,
            memory=not no_memory,
            threads=threads,
            facts=facts,
        )

    from benchmarks.report import plot, table

    report = json.dumps({**facts, "rows": rows}, indent=1)
    title = f"{preset}, one iteration of {method}, batch {case.batch}, the trainer in {precision}"
    machine = f"{facts['device']}, {facts['threads']} thread(s), torch {facts['torch']}"
    click.echo(report if as_json else f"training: {title}\n{machine}, C++ {facts['extension']}\n{table(rows)}")
    write_text(outdir / "training.json", report + "\n")
    if target is not None:
        book.append(target, [row for row in rows if "skipped" not in row])
    try:
        plot(outdir / "training.png", rows, f"{title}\n{machine}")
    except ImportError:
        click.echo("no plot: pip install 'sign-fast[bench]' brings matplotlib", err=True)


def main() -> None:
    """Run; foreseen errors are one line and a non-zero exit status."""
    try:
        training.main(prog_name="training.py", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"training: error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except SignFastError as error:
        click.echo(f"training: error: {first_line(error)}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("training: interrupted, nothing was written", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()

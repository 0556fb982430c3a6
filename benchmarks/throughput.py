"""How many images a second, against ordinary PyTorch? Run with --help for the arguments.

Every provider runs the same sampler on the same seeds; outputs are compared before anything is timed; the providers
take turns, so that drift of the machine hits all alike; medians are reported, and how near they are to the roofline
(see `benchmarks.roofline`). Besides throughput: --latency, --cold and --sweep.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

from sign_fast.errors import SignFastError, first_line

_MODES = ("latency", "cold", "sweep")
_SECONDS = {"throughput": 20.0, "latency": 20.0, "cold": 0.0, "sweep": 300.0}
_QUICK_SECONDS = {"throughput": 2.5, "latency": 2.5, "cold": 0.0, "sweep": 40.0}


def _batches(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 1 such as 1,16")
    return numbers


def _mode(latency: bool, cold: bool, sweep: bool, batch: tuple[int, ...] | None, skip_cold: bool) -> str:
    """Which measurement; a contradiction is an error."""
    chosen = [name for name, wanted in zip(_MODES, (latency, cold, sweep), strict=True) if wanted]
    if len(chosen) > 1:
        raise click.UsageError(f"--{chosen[0]} and --{chosen[1]} are two measurements: name one")
    if latency and batch not in (None, (1,)):
        raise click.UsageError("--latency is measured at batch 1: leave --batch out")
    if cold and skip_cold:
        raise click.UsageError("--cold measures what --skip-cold leaves out: name one")
    return chosen[0] if chosen else "throughput"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--preset", default="digits-uncond", show_default=True, help="Preset, bundled name or folder.")
@click.option("--latency", is_flag=True, help="Batch 1, 100 calls at least, p99 as well.")
@click.option("--cold", is_flag=True, help="Only fresh processes, three times: their start to the first image.")
@click.option("--sweep", is_flag=True, help="Images/s over batch size and steps, with a plot.")
@click.option("--batch", callback=_batches, metavar="LIST", help="[default: 1,16; --cold 1; --sweep 1,2,4,…,512]")
@click.option("--steps", type=click.IntRange(min=1), help="--sweep: from 1 to this.  [default: 1; --sweep 4]")
@click.option("--sampler", type=click.Choice(["few_step", "edm"]), default="few_step", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [default: PyTorch's]")
@click.option("--providers", default="plain,compile,sign_fast", show_default=True, help="Also known: drop_in.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="Timing of each batch size; --sweep: of all.  [default: 20; --sweep 300]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and images.")
@click.option("--outdir", type=click.Path(path_type=Path), default="out/throughput", show_default=True)
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), help="CSV file to append to.")
@click.option("--no-ledger", is_flag=True, help="Append nowhere.")
@click.option("--no-roofline", is_flag=True, help="Measure no ceilings.")
@click.option("--skip-cold", is_flag=True, help="Leave out first image, warm-up and peak memory (fresh processes).")
@click.option(
    "--cold-timeout",
    type=click.FloatRange(min=1),
    default=900,
    show_default=True,
    help="Seconds a provider may take to its first images, in a fresh process and in this one; --sweep: in all.",
)
@click.option("--quick", is_flag=True, help="About a minute; appends to no ledger unless one is named.")
def throughput(
    preset: str,
    latency: bool,
    cold: bool,
    sweep: bool,
    batch: tuple[int, ...] | None,
    steps: int | None,
    sampler: str,
    dtype: str,
    device: str | None,
    threads: int | None,
    providers: str,
    seconds: float | None,
    seed: int,
    outdir: Path,
    ledger: Path | None,
    no_ledger: bool,
    no_roofline: bool,
    skip_cold: bool,
    cold_timeout: float,
    quick: bool,
) -> None:
    """Throughput of one-step and few-step generation, by provider."""
    mode = _mode(latency, cold, sweep, batch, skip_cold)
    if threads is not None:  # before torch is imported; child processes take it over
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    from benchmarks import ledger as book
    from benchmarks.comparison import Run
    from benchmarks.providers import PROVIDERS, Case, describe_weights
    from sign_fast.checkpoints.atomic import make_folder, write_text
    from sign_fast.checkpoints.store import resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    names = list(dict.fromkeys(providers.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise SignFastError(f"unknown provider {unknown[0]!r}: known: {', '.join(PROVIDERS)}")
    case = Case(preset, sampler, 1 if sweep else steps or 1, dtype, str(resolve_device(device)), seed)
    if seconds is None:
        seconds = (_QUICK_SECONDS if quick else _SECONDS)[mode]
    target = ledger if ledger is not None else None if no_ledger or quick else book.DEFAULT
    make_folder(outdir)
    facts = {
        **book.environment(case.device),
        "mode": mode,
        "preset": preset,
        "weights": describe_weights(case),
        "sampler": sampler,
        "dtype": dtype,
    }
    run = Run(case, names, seconds, cold_timeout, threads, facts, bounded=not (cold or no_roofline))
    rows = _rows(run, mode, batch, steps, quick, skip_cold)

    from benchmarks.report import plot, plot_sweep, table

    of_steps = f"1 to {max(row.get('steps', 1) for row in rows)}" if sweep else str(case.steps)
    title = f"{preset}, {sampler} {of_steps} step(s), {dtype}"
    click.echo(f"{mode}: {title}, {facts['weights']} weights")
    click.echo(f"{facts['device']}, {facts['threads']} thread(s), torch {facts['torch']}, C++ {facts['extension']}")
    if run.ceilings is not None:
        click.echo(run.ceilings)
    click.echo(table(rows))
    write_text(outdir / f"{mode}.json", json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    if target is not None:
        book.append(target, [row for row in rows if "skipped" not in row])
    try:
        draw = {"throughput": plot, "sweep": plot_sweep}.get(mode)
        if draw is not None:
            draw(
                outdir / f"{mode}.png",
                rows,
                f"{title}\n{facts['device']}, {facts['threads']} thread(s), torch {facts['torch']}",
            )
    except ImportError:
        click.echo("no plot: pip install 'sign-fast[bench]' brings matplotlib", err=True)


def _rows(
    run: Any, mode: str, batch: tuple[int, ...] | None, steps: int | None, quick: bool, skip_cold: bool
) -> list[dict[str, Any]]:
    from benchmarks import sweep
    from benchmarks.cold import compiler_caches
    from benchmarks.comparison import compare, first_images
    from benchmarks.measure import TAIL_ROUNDS

    if mode == "cold":
        return [row for number in batch or (1,) for row in first_images(run, number)]
    if mode == "sweep":
        with compiler_caches(keep=True):
            return sweep.sweep(run, batch or sweep.BATCHES, steps or sweep.STEPS)
    if mode == "latency":
        with compiler_caches(keep=True):
            return compare(run, 1, fresh=False, rounds=TAIL_ROUNDS)
    batches = batch or (1, 16)
    rows = []
    for number in batches:
        fresh = not (skip_cold or (quick and number != batches[0]))
        # a cache for each batch size: compiling in the fresh process is cold, and is not paid for twice
        with compiler_caches(keep=not fresh):
            rows += compare(run, number, fresh)
    return rows


def main() -> None:
    """Run; foreseen errors are one line and a non-zero exit status."""
    try:
        throughput.main(prog_name="throughput.py", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"throughput: error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except SignFastError as error:
        click.echo(f"throughput: error: {first_line(error)}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("throughput: interrupted, nothing was written", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()

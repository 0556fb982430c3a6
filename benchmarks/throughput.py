"""How many images a second, against ordinary PyTorch? Run with --help for the arguments.

Every provider runs the same sampler on the same seeds; outputs are compared before anything is timed; the providers
take turns, so that drift of the machine hits all alike; medians are reported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

from sign_fast.errors import SignFastError, first_line

_QUICK = {"batch": (1, 16), "seconds": 2.5}


def _batches(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 1 such as 1,16")
    return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--preset", default="digits-uncond", show_default=True, help="Preset, bundled name or folder.")
@click.option("--batch", callback=_batches, metavar="LIST", help="Batch sizes.  [default: 1,16]")
@click.option("--steps", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--sampler", type=click.Choice(["few_step", "edm"]), default="few_step", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--providers", default="plain,compile,sign_fast", show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0), help="Time for each batch size.  [default: 20]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and images.")
@click.option("--outdir", type=click.Path(path_type=Path), default="out/throughput", show_default=True)
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), help="CSV file to append to.")
@click.option("--no-ledger", is_flag=True, help="Append nowhere.")
@click.option("--skip-cold", is_flag=True, help="Leave out first image, warm-up and peak memory (fresh processes).")
@click.option("--cold-timeout", type=click.FloatRange(min=1), default=900, show_default=True, help="Seconds.")
@click.option("--quick", is_flag=True, help="About a minute; appends to no ledger unless one is named.")
def throughput(
    preset: str,
    batch: tuple[int, ...] | None,
    steps: int,
    sampler: str,
    dtype: str,
    device: str | None,
    providers: str,
    seconds: float | None,
    seed: int,
    outdir: Path,
    ledger: Path | None,
    no_ledger: bool,
    skip_cold: bool,
    cold_timeout: float,
    quick: bool,
) -> None:
    """Throughput of one-step and few-step generation, by provider."""
    from benchmarks import ledger as book
    from benchmarks.providers import PROVIDERS, Case, describe_weights
    from sign_fast.checkpoints.atomic import make_folder, write_text
    from sign_fast.checkpoints.store import resolve_device

    names = list(dict.fromkeys(providers.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise SignFastError(f"unknown provider {unknown[0]!r}: known: {', '.join(PROVIDERS)}")
    case = Case(preset, sampler, steps, dtype, str(resolve_device(device)), seed)
    batches = batch or _QUICK["batch"]
    budget = seconds if seconds is not None else _QUICK["seconds"] if quick else 20.0
    target = ledger if ledger is not None else None if no_ledger or quick else book.DEFAULT
    make_folder(outdir)

    shared = {
        **book.environment(case.device),
        "preset": preset,
        "weights": describe_weights(case),
        "steps": steps,
        "sampler": sampler,
        "dtype": dtype,
    }
    rows: list[dict[str, Any]] = []
    for number in batches:
        with tempfile.TemporaryDirectory() as cache:
            # a cache for each batch size: compiling in the fresh process is cold, and is not paid for twice
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            fresh = not (skip_cold or (quick and number != batches[0]))
            rows += _measure(case, names, number, budget, seed, fresh, cold_timeout, shared)

    from benchmarks.report import plot, table

    click.echo(f"{preset} ({shared['weights']} weights), {sampler} {steps} step(s), {dtype}")
    click.echo(f"{shared['device']}, {shared['threads']} threads, torch {shared['torch']}, C++ {shared['extension']}")
    click.echo(table(rows))
    write_text(outdir / "throughput.json", json.dumps({**shared, "rows": rows}, indent=1) + "\n")
    if target is not None:
        book.append(target, [row for row in rows if "skipped" not in row])
    try:
        title = f"{preset}, {sampler} {steps} step(s), {dtype}\n{shared['device']}, torch {shared['torch']}"
        plot(outdir / "throughput.png", rows, title)
    except ImportError:
        click.echo("no plot: pip install 'sign-fast[bench]' brings matplotlib", err=True)


def _measure(
    case: Any,
    names: list[str],
    batch: int,
    budget: float,
    seed: int,
    fresh: bool,
    cold_timeout: float,
    shared: dict[str, Any],
) -> list[dict[str, Any]]:
    import dataclasses

    from benchmarks.measure import cold, interleaved, summary
    from benchmarks.providers import Provider, build_network, check, try_provider

    cold_figures: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for name in names if fresh else []:
        _say(f"batch {batch}: {name} in a fresh process")
        try:
            cold_figures[name] = cold(name, case, batch, cold_timeout)
        except RuntimeError as error:
            failed[name] = first_line(error)
    net = build_network(case)
    exact = Provider("plain", dataclasses.replace(case, dtype="float32"), net)
    plain = Provider("plain", case, net)
    rows: list[dict[str, Any]] = []
    ready = []
    # other seeds than those of the timing: the comparison is on numbers that nothing was tuned on
    seeds = [1_000_000 + seed + i for i in range(batch)]
    for name in names:
        _say(f"batch {batch}: warming up {name}")
        provider, why = (None, failed[name]) if name in failed else try_provider(name, case, net, seeds)
        if provider is None:
            rows.append({"batch": batch, "provider": name, "skipped": why})
            continue
        if wrong := check(provider, plain, exact, seeds):
            raise SignFastError(f"nothing is reported, an output is wrong: {wrong}")
        ready.append(provider)
    if not ready:
        raise SignFastError(f"no provider runs here: {rows[-1]['skipped']}")
    _say(f"batch {batch}: timing")
    for name, figures in summary(interleaved(ready, batch, budget, seed), batch).items():
        rows.append({**shared, "batch": batch, "provider": name, **figures, **cold_figures.get(name, {})})
    return rows


def _say(text: str) -> None:
    click.echo(f"  {text} …", err=True)


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

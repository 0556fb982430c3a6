"""`sign-fast build-cubins`: machine code of the kernels for GPUs that are elsewhere."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import SignFastError, first_line


@click.command("build-cubins")
@click.option(
    "--archs",
    envvar="SIGN_FAST_ARCHS",
    help='Compute capabilities, e.g. "8.0;9.0" or "8.9+PTX" (PTX serves newer GPUs).  [default: SIGN_FAST_ARCHS]',
)
@click.option(
    "--presets",
    envvar="SIGN_FAST_PRESETS",
    help="Networks that wheels are built for, by names or their first parts: digits, cifar10, sdxl, …"
    "  [default: all, or none with --network]",
)
@click.option(
    "--network",
    "networks",
    multiple=True,
    help="Your own: a network's or a run's folder, or a bundled name. Repeatable.",
)
@click.option(
    "--outdir", type=click.Path(path_type=Path, file_okay=False), default="packs", show_default=True, help="Where to."
)
@click.option("--jobs", type=click.IntRange(min=1), envvar="MAX_JOBS", help="Compilers at a time.  [default: cores]")
def build_cubins(
    archs: str | None, presets: str | None, networks: Sequence[str], outdir: Path, jobs: int | None
) -> None:
    """Compile the kernel variants that networks need, generating and in distillation, into packs: sm_90.zip, …

    Needs Triton and no GPU. SIGN_FAST_PACKS=OUTDIR makes the packs known where they are used.

    \b
    sign-fast build-cubins --archs "8.0;9.0" --presets digits
    sign-fast build-cubins --archs 9.0 --network out/my-student
    """
    from ..kernels.packs import build as builder
    from ..kernels.packs.architectures import parse

    if not archs or not archs.strip():
        raise SignFastError('name --archs, e.g. --archs "8.0;9.0"')
    try:
        architectures = parse(archs)
        named = presets.replace(",", " ").replace(";", " ").split() if presets else None
        table = dict(builder.chosen(named, _known())) if named is not None or not networks else {}
        for name in networks:
            table[name] = _calls_of(name)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        paths = builder.build(architectures, outdir, table=table, jobs=jobs, report=_progress())
    except KeyboardInterrupt:
        click.echo(f"sign-fast: error: interrupted: {outdir} has the packs that were complete", err=True)
        sys.exit(130)
    except OSError as error:
        raise SignFastError(f"{first_line(error)}: choose another --outdir") from error
    except (ValueError, builder.BuildError) as error:
        raise SignFastError(first_line(error)) from error
    for path in paths:
        click.echo(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


def _known() -> Any:
    from ..kernels.packs import calls

    return calls.networks()


def _calls_of(name: str) -> Any:
    """The calls of a network's folder, a bundled one or a preset.

    Raises:
        SignFastError: there is none of that name.
    """
    from ..checkpoints.store import bundled_names, find, read_config
    from ..deployment.recording import calls_of
    from ..models.presets import preset, preset_names

    if name in preset_names() and name not in bundled_names():
        return list(calls_of(*preset(name)))
    if name in _known():
        raise SignFastError(f"--network is for your own: {name} goes with --presets")
    of_run = Path(name) / "network"  # where a training run keeps it
    config = read_config(find(of_run if (of_run / "config.json").exists() else name))
    return list(calls_of(config["cls"], config["kwargs"]))


def _progress() -> Callable[[str, int, int], None]:
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def report(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=name, unit="kernel", file=sys.stderr, disable=not os.isatty(2))
        bars[name].update(done - bars[name].n)
        if done == total:
            bars[name].close()

    return report

"""What machine code do the Triton kernels become? Compiles them for every architecture, without a GPU.

Every kernel at every shape of the published networks: registers, spilled bytes, shared memory, occupancy, width of the
accesses to global memory, matrix instructions. The table sums up by kernel; --out has a row for each machine code.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(ROOT))

import click
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks.kernel_cases import DTYPES, OPERATIONS, Case, Direction
from benchmarks.ledger import commit
from sign_fast.kernels.ahead_of_time import ARCHITECTURES, compile
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.packs.key import key
from sign_fast.kernels.resources import resources, wide_share

LEDGER = ROOT / "benchmarks" / "results" / "codegen.csv"
WIDE_SHARE = 0.95


@dataclass
class Job:
    """One machine code: the launch `place` of a case that needs it, and how many launches of all cases do."""

    case: Case
    direction: Direction
    place: int
    architecture: int
    launches: int = 1


def jobs(cases: Iterable[Case], architectures: Sequence[int]) -> list[Job]:
    """Every different machine code that the cases need, in a fixed order."""
    found: dict[tuple[int, str], Job] = {}
    for case in cases:
        for architecture in architectures:
            for direction in case.directions:
                for place, launch in enumerate(case.launches(direction, KNOWN[architecture])):
                    name = (architecture, key(launch))
                    if name in found:
                        found[name].launches += 1
                    else:
                        found[name] = Job(case, direction, place, architecture)
    return sorted(found.values(), key=lambda job: job.architecture)


def covering(all_jobs: Iterable[Job]) -> list[Job]:
    """One job for each kernel, its constants, warps, and whether its accesses can be wide.

    The one with most tensors, which presses registers hardest.
    """
    best: dict[tuple[Any, ...], tuple[int, Job]] = {}
    for job in all_jobs:
        launch = job.case.launches(job.direction, KNOWN[job.architecture])[job.place]
        constants = tuple(sorted((name, str(value)) for name, value in launch.constants.items()))
        name = (job.architecture, launch.kernel.__name__, constants, launch.num_warps, job.case.dtype, job.case.wide)
        tensors = sum(isinstance(value, Tensor) for value in launch.arguments.values())
        if name not in best or tensors > best[name][0]:
            best[name] = (tensors, job)
    return [job for _, job in best.values()]


def few(all_jobs: Iterable[Job]) -> list[Job]:
    """Two of the covering jobs for each kernel, dtype and architecture: the first and the last."""
    groups: dict[tuple[Any, ...], list[Job]] = defaultdict(list)
    for job in covering(all_jobs):
        kernel = job.case.launches(job.direction, KNOWN[job.architecture])[job.place].kernel.__name__
        groups[job.architecture, kernel, job.case.dtype].append(job)
    return [job for members in groups.values() for job in members[:: max(1, len(members) - 1)][:2]]


def measure(job: Job) -> dict[str, Any]:
    """Compile and read the machine code: one row of the full table."""
    launch = job.case.launches(job.direction, KNOWN[job.architecture])[job.place]
    found = resources(compile(launch, job.architecture))
    share = wide_share(found, launch, job.case.activations)
    return {
        "architecture": job.architecture,
        "operation": job.case.operation,
        "kernel": launch.kernel.__name__,
        "dtype": job.case.dtype,
        "shape": job.case.shape,
        "batch": job.case.batch,
        "constants": " ".join(f"{name}={value}" for name, value in launch.constants.items()),
        "launches": job.launches,
        "warps": found.warps,
        "registers": found.registers,
        "spilled_bytes": found.spilled_bytes,
        "shared_bytes": found.shared_bytes,
        "occupancy": round(found.occupancy, 3),
        "loads": _counts(found.loads),
        "stores": _counts(found.stores),
        "wide_share": "" if share is None else round(share, 4),
        "must_be_wide": job.case.wide,
        "matrix": _counts(found.matrix),
        "atomics": found.atomics,
    }


def _counts(table: Any) -> str:
    return " ".join(f"{name}:{count}" for name, count in table.items())


def measure_all(wanted: Sequence[Job], processes: int, say: bool = False) -> list[dict[str, Any]]:
    """`measure` in parallel, the rows in the jobs' order."""
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for row in pool.map(measure, wanted, chunksize=4):
            rows.append(row)
            if say and len(rows) % 100 == 0:
                click.echo(f"  {len(rows)} of {len(wanted)}, {time.monotonic() - started:.0f} s", err=True)
    return rows


def problems(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What the tests forbid: spills, atomics, narrow accesses to activations, attention on sm_90 without wgmma."""
    found = []
    for row in rows:
        where = f"sm_{row['architecture']} {row['kernel']} {row['dtype']} {row['shape']} batch {row['batch']}"
        if row["spilled_bytes"]:
            found.append(f"{where}: {row['spilled_bytes']} bytes a thread spilled ({row['constants']})")
        if row["atomics"]:
            found.append(f"{where}: atomics")
        if row["must_be_wide"] and row["wide_share"] != "" and row["wide_share"] < WIDE_SHARE:
            found.append(
                f"{where}: 16-byte accesses move {row['wide_share']:.1%} of the activations' bytes ({row['constants']})"
            )
        if row["architecture"] == 90 and row["dtype"] != "float32" and "HMMA" in row["matrix"].split(":"):
            found.append(f"{where}: matrix products without wgmma ({row['matrix']})")
    return found


SUMMARY = [
    "operation", "kernel", "dtype", "architecture", "machine_codes", "launches", "warps", "registers", "spilled_bytes",
    "shared_bytes", "occupancy", "wide_share", "matrix", "tightest_shape", "triton", "commit",
]  # fmt: skip


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each kernel, dtype and architecture: ranges, and the shape with most registers and spills."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["operation"], row["kernel"], row["dtype"], row["architecture"]].append(row)

    def span(members: list[dict[str, Any]], name: str) -> str:
        values = sorted({row[name] for row in members if row[name] != ""})
        return "" if not values else f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}"

    lines = []
    for (operation, kernel, dtype, architecture), members in sorted(groups.items()):
        worst = max(members, key=lambda row: (row["spilled_bytes"], row["registers"]))
        shares = [row["wide_share"] for row in members if row["must_be_wide"] and row["wide_share"] != ""]
        names = sorted({part.split(":")[0] for row in members for part in row["matrix"].split()})
        lines.append(
            {
                "operation": operation,
                "kernel": kernel,
                "dtype": dtype,
                "architecture": architecture,
                "machine_codes": len(members),
                "launches": sum(row["launches"] for row in members),
                "warps": span(members, "warps"),
                "registers": span(members, "registers"),
                "spilled_bytes": worst["spilled_bytes"],
                "shared_bytes": span(members, "shared_bytes"),
                "occupancy": span(members, "occupancy"),
                "wide_share": min(shares) if shares else "",
                "matrix": " ".join(names),
                "tightest_shape": f"{worst['shape']} x{worst['batch']}",
            }
        )
    return lines


def joined(path: Path, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table in the file with these lines in place of those of the same operations, dtypes and architectures."""

    def measured(line: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(line[name]) for name in ("operation", "dtype", "architecture"))

    new = set(map(measured, lines))
    old = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    kept = [line for line in old if measured(line) not in new]
    order = ("operation", "kernel", "dtype")
    return sorted([*kept, *lines], key=lambda line: (*(line[name] for name in order), int(line["architecture"])))


def write(path: Path, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _names(known: Sequence[Any]) -> Any:
    def parse(ctx: click.Context, param: click.Parameter, value: str) -> tuple[Any, ...]:
        words = value.split(",")
        if unknown := [word for word in words if word not in map(str, known)]:
            raise click.BadParameter(f"{unknown[0]!r} is not among {', '.join(map(str, known))}")
        return tuple(name for name in known if str(name) in words)

    return parse


def list_option(option: str, known: Sequence[Any]) -> Any:
    """A click option that takes some of `known`, separated by commas."""
    default = ",".join(map(str, known))
    return click.option(option, default=default, show_default=True, callback=_names(known), metavar="LIST")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@list_option("--architectures", ARCHITECTURES)
@list_option("--operations", OPERATIONS)
@list_option("--dtypes", tuple(DTYPES))
@click.option("--every", is_flag=True, help="Latent diffusion's shapes and all the folds as well.")
@click.option(
    "--depth",
    type=click.Choice(["all", "covering", "few"]),
    default="all",
    show_default=True,
    help="All machine codes; one for each kernel and its constants; two for each kernel.",
)
@click.option("--check", is_flag=True, help="Say what the tests forbid; then the exit status is 1.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="CSV of every machine code.")
@click.option("--ledger", is_flag=True, help=f"Put the lines into {LEDGER.relative_to(ROOT)}.")
@click.option("--processes", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
def codegen(
    architectures: tuple[int, ...],
    operations: tuple[str, ...],
    dtypes: tuple[str, ...],
    every: bool,
    depth: str,
    check: bool,
    out: Path | None,
    ledger: bool,
    processes: int,
) -> None:
    """Compile the kernels for each architecture and tell what they need of it."""
    import triton

    cases = [case for name in operations for case in kernel_cases.cases(name, dtypes=dtypes, every=every)]
    wanted = jobs(cases, architectures)
    if depth != "all":
        wanted = covering(wanted) if depth == "covering" else few(wanted)
    click.echo(f"{len(wanted)} machine codes for {len(cases)} cases", err=True)
    rows = measure_all(wanted, processes, say=True)
    lines = [{**line, "triton": triton.__version__, "commit": commit()} for line in summary(rows)]
    shown = SUMMARY[:-2]
    widths = [max(len(str(line[name])) for line in [dict(zip(shown, shown, strict=True)), *lines]) for name in shown]
    for line in [dict(zip(shown, shown, strict=True)), *lines]:
        click.echo("  ".join(str(line[name]).ljust(width) for name, width in zip(shown, widths, strict=True)).rstrip())
    if out is not None:
        write(out, rows, list(rows[0]))
    if ledger:
        write(LEDGER, joined(LEDGER, lines), SUMMARY)
    if check and (wrong := problems(rows)):
        click.echo("\n".join(wrong))
        sys.exit(1)


if __name__ == "__main__":
    codegen()

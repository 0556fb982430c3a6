"""How often does GroupNorm–SiLU move its activations? Computed from the launch configurations, nothing runs.

One read and one write is the least. A program that cannot hold its pixels on chip walks over them twice; the second
walk is arranged to find them in the L2 cache, but counts here.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(ROOT))

import click

from benchmarks.kernel_cases import BATCHES, DTYPES, Direction
from benchmarks.kernel_cases.group_norm_silu import NormCase, cases
from sign_fast.kernels.ahead_of_time import ARCHITECTURES
from sign_fast.kernels.device import KNOWN, Device

LEDGER = ROOT / "benchmarks" / "results" / "traffic.csv"


def strategy(case: NormCase, direction: Direction, device: Device) -> str:
    """tile, loop or split: the kernel that the configuration chose, see kernels/group_norm_silu/config.py."""
    names = [launch.kernel.__name__ for launch in case.launches(direction, device)]
    name = next(name for name in names if name.startswith(direction))
    return {"tile": "tile", "loop": "loop", "partial": "split"}[name.removeprefix(f"{direction}_")]


def passes(case: NormCase, direction: Direction, device: Device) -> tuple[int, int]:
    """How many activations are read and written, repetitions counted.

    Forward reads x, or h and the skip, and writes y, and the stream; backward reads x, dy, and the stream's gradient,
    and writes dx. A second walk reads x again, or the stream in its place; backward also dy.
    """
    again = strategy(case, direction, device) != "tile"
    if direction == "forward":
        return 1 + case.joins + again, 1 + case.joins
    return 2 + case.joins + 2 * again, 1


def table(architecture: int) -> list[dict[str, Any]]:
    """A row for each official shape, dtype and batch."""
    rows = []
    for case in cases(BATCHES, tuple(DTYPES), False):
        assert isinstance(case, NormCase)
        row: dict[str, Any] = {
            "architecture": architecture, "shape": case.shape, "dtype": case.dtype, "batch": case.batch
        }  # fmt: skip
        for direction in case.directions:
            reads, writes = passes(case, direction, KNOWN[architecture])
            least = case.bytes(direction) // (case.batch * case.norm.channels * case.norm.size**2 * case.itemsize)
            row |= {
                direction: strategy(case, direction, KNOWN[architecture]),
                f"{direction}_reads": reads,
                f"{direction}_writes": writes,
                f"{direction}_of_least": round((reads + writes) / least, 3),
            }
        rows.append(row)
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--architecture", type=click.Choice([str(a) for a in ARCHITECTURES]), default="90", show_default=True)
@click.option("--ledger", is_flag=True, help=f"Write the table to {LEDGER.relative_to(ROOT)}.")
def traffic(architecture: str, ledger: bool) -> None:
    """Reads and writes of the activations at every shape of the published networks."""
    rows = table(int(architecture))
    columns = list(rows[0])
    lines = [columns, *[[str(row[name]) for name in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if ledger:
        with LEDGER.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    traffic()

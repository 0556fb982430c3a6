"""The table of reads and writes is what the launch configurations give."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from benchmarks.kernel_cases.group_norm_silu import NormCase
from benchmarks.official_shapes import Norm
from benchmarks.traffic import LEDGER, passes, table
from sign_fast.kernels.device import KNOWN

ROOT = Path(__file__).parents[2]


def test_the_ledger_is_current():
    """Run python benchmarks/traffic.py --ledger where it is not."""
    with LEDGER.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert written == [{name: str(value) for name, value in row.items()} for row in table(90)]


def test_passes():
    tile, loop = NormCase(64, "float32", Norm((256,), 16, 32)), NormCase(64, "bfloat16", Norm((256,), 64, 32))
    assert passes(tile, "forward", KNOWN[90]) == (1, 1) and passes(tile, "backward", KNOWN[90]) == (2, 1)
    assert passes(loop, "forward", KNOWN[90]) == (2, 1) and passes(loop, "backward", KNOWN[90]) == (4, 1)
    join = NormCase(64, "float32", Norm((256,), 16, 32, "skip"))
    assert passes(join, "forward", KNOWN[90]) == (2, 2) and passes(join, "backward", KNOWN[90]) == (3, 1)


def test_command():
    done = subprocess.run(
        [sys.executable, "benchmarks/traffic.py", "--architecture", "80"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[0].startswith("architecture  shape")
    assert len(done.stdout.splitlines()) == 1 + len(table(80))

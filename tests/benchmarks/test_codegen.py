"""Held for every kernel's machine code: nothing spills, accesses are wide, attention on Hopper uses wgmma."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import codegen, kernel_cases
from benchmarks.official_shapes import Norm, calls, official

ROOT = Path(__file__).parents[2]
PROCESSES = os.cpu_count() or 1
OTHERS = [a for a in codegen.ARCHITECTURES if a != 90]


@pytest.mark.parametrize("operation", kernel_cases.OPERATIONS)
def test_machine_code(operation):
    """All kernels, on sm_90 in bfloat16 with a quarter of their sets of constants, in float32 and on each of the other
    architectures with the first or the last; `benchmarks/codegen.py --check` compiles them all."""
    low, full = (kernel_cases.cases(operation, dtypes=(dtype,)) for dtype in ("bfloat16", "float32"))
    hopper = codegen.jobs(low, [90])
    wanted = codegen.few(hopper)
    wanted += [job for job in codegen.covering(hopper)[::4] if job not in wanted]
    wanted += codegen.few(codegen.jobs(full, [90])) + codegen.few(codegen.jobs(low, OTHERS))[::2]
    rows = codegen.measure_all(wanted, PROCESSES)
    assert {row["kernel"] for row in rows if row["architecture"] == 90} == {row["kernel"] for row in rows}
    assert {row["architecture"] for row in rows} == set(codegen.ARCHITECTURES)
    assert not codegen.problems(rows), "\n".join(codegen.problems(rows))


def test_rows_that_break_the_rules_are_found():
    good = {
        "architecture": 90, "kernel": "k", "dtype": "bfloat16", "shape": "s", "batch": 1, "constants": "",
        "spilled_bytes": 0, "atomics": 0, "wide_share": 0.951, "must_be_wide": True, "matrix": "HGMMA:2",
    }  # fmt: skip
    assert not codegen.problems([good, {**good, "matrix": "HMMA:2", "architecture": 80}])
    assert not codegen.problems([{**good, "wide_share": 0.2, "must_be_wide": False}, {**good, "wide_share": ""}])
    for bad in ({"spilled_bytes": 8}, {"atomics": 1}, {"wide_share": 0.94}, {"matrix": "HMMA:2"}):
        assert len(codegen.problems([{**good, **bad}])) == 1


def test_the_shapes_are_the_networks():
    """Counts that SPEC.md lists, of GroupNorms and attention calls in one forward pass."""
    assert sum(n for call, n in calls("cifar10-uncond-vp").items() if isinstance(call, Norm)) == 73
    assert sum(n for call, n in calls("imagenet64-cond-adm").items() if isinstance(call, Norm)) == 95
    group_channels = {call.channels // call.groups for call in official(Norm)}
    assert group_channels == {4, 6, 8, 12, 16, 18, 24, 30, 36, 42, 48}


def test_command(tmp_path):
    out = tmp_path / "table.csv"
    command = ["benchmarks/codegen.py", "--architectures", "90", "--dtypes", "bfloat16", "--depth", "few", "--out", out]
    operation = ["--operations", "distill_loss", "--processes", str(PROCESSES)]
    done = subprocess.run([sys.executable, *map(str, command), *operation], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert {row["kernel"] for row in rows} == {"losses_and_gradients", "gradients", "sums", "finish"}
    assert all(row["architecture"] == "90" and row["dtype"] == "bfloat16" for row in rows)
    assert "losses_and_gradients" in done.stdout and "registers" in done.stdout
    assert list(rows[0])[:3] == ["architecture", "operation", "kernel"]


def test_lines_measured_anew_take_the_place_of_their_like(tmp_path):
    line = dict.fromkeys(codegen.SUMMARY, "") | {"operation": "attention", "kernel": "k", "dtype": "float32"}
    old = [{**line, "architecture": a, "registers": "old"} for a in (90, 100)]
    old.append({**old[0], "operation": "sampler_step"})
    path = tmp_path / "table.csv"
    codegen.write(path, codegen.joined(path, old), codegen.SUMMARY)
    new = [{**line, "kernel": name, "architecture": 90, "registers": "new"} for name in ("k1", "k2")]
    new.append({**new[0], "operation": "combine"})
    found = [(r["operation"], r["kernel"], str(r["architecture"]), r["registers"]) for r in codegen.joined(path, new)]
    assert found == [
        ("attention", "k", "100", "old"),
        ("attention", "k1", "90", "new"),
        ("attention", "k2", "90", "new"),
        ("combine", "k1", "90", "new"),
        ("sampler_step", "k", "90", "old"),
    ]


def test_bad_arguments_are_named():
    done = subprocess.run(
        [sys.executable, "benchmarks/codegen.py", "--architectures", "91"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "'91' is not among 80, 89, 90, 100, 120" in done.stderr

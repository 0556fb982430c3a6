"""The kernel timings: what they write, that wrong outputs and slow paths are refused. Nothing here asserts on time."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._functorch.config as functorch_config

from benchmarks import kernels
from benchmarks.kernel_cases import OPERATIONS, cases, cpu_cases, small_cases
from benchmarks.kernel_cases.attention import AttentionCase
from benchmarks.kernel_cases.group_norm_silu import NormCase
from benchmarks.kernel_timing import difference
from benchmarks.official_shapes import Attention, Norm
from sign_fast.errors import SignFastError
from sign_fast.kernels import extension
from sign_fast.kernels.device import KNOWN

ROOT = Path(__file__).parents[2]
needs_extension = pytest.mark.skipif(extension.missing() is not None, reason="the C++ extension is not built")


@needs_extension
def test_results_and_their_ledger(tmp_path):
    program = [sys.executable, "benchmarks/kernels.py"]
    out, book = tmp_path / "results.json", tmp_path / "kernels.csv"
    command = [
        *program,
        "--device",
        "cpu",
        "--operations",
        "group_norm_silu",
        "--quick",
        "--seconds",
        "0",
        "--out",
        out,
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"device", "driver", "torch", "triton", "commit", "command"} <= report["environment"].keys()
    assert {row["provider"] for row in report["rows"]} == {"sign_fast", "eager"}
    assert {row["direction"] for row in report["rows"]} == {"forward", "backward"}
    for row in report["rows"]:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"] and row["rounds"] >= 5
        if row["provider"] == "eager":
            assert row["ratio_to_eager"] == 1
    assert "times as fast as eager (geometric mean of 2 shapes" in done.stdout
    for _ in range(2):
        import_command = [*program, "--ledger", str(out), "--ledger-file", str(book)]
        subprocess.run(import_command, cwd=ROOT, check=True, capture_output=True)
    rows = list(csv.DictReader(book.open()))
    assert len(rows) == 2 * len(report["rows"]) and list(rows[0]) == kernels.FACTS + kernels.FIGURES
    assert rows[0]["device"] == report["environment"]["device"]


@dataclass(frozen=True)
class Wrong(NormCase):
    def ours(self, inputs):
        return tuple(y * 1.01 for y in super().ours(inputs))


@dataclass(frozen=True)
class Slow(NormCase):
    def ours(self, inputs):
        return self.eager(inputs)


def test_wrong_outputs_are_not_timed():
    with pytest.raises(SignFastError, match=r"is wrong: its error is 1\.00e-02"):
        kernels.measure(Wrong(1, "float32", Norm((8,), 4, 2)), "forward", None, 0)


def test_a_slow_path_is_not_timed():
    with pytest.raises(SignFastError, match="does not take its fast path"):
        kernels.measure(Slow(1, "float32", Norm((8,), 4, 2)), "forward", None, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_cases_agree_with_ordinary_torch(operation):
    for case in small_cases(operation):
        torch.manual_seed(0)
        inputs = case.inputs("cpu")
        for direction in case.directions:
            assert difference(case, inputs, direction) <= kernels.TOLERANCE[case.dtype], (case.shape, direction)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_case_has_launches_and_bytes(operation):
    found = cases(operation, every=True)
    assert len(set(found)) == len(found) and cpu_cases(operation)
    for case in found[:: max(1, len(found) // 40)]:
        for direction in case.directions:
            launches = case.launches(direction, KNOWN[90])
            assert launches and case.bytes(direction) > 0
            names = {name for launch in launches for name, t in launch.arguments.items() if isinstance(t, torch.Tensor)}
            assert names & case.activations


def test_a_rival_that_cannot_run_is_left_out_with_its_reason():
    case = AttentionCase(1, "float32", Attention(1, 8, 16))
    for direction in case.directions:
        rows = {row["provider"]: row for row in kernels.measure(case, direction, None, 0)}
        assert "No viable backend" in rows["sdpa cudnn"]["skipped"]
        assert rows["sign_fast"]["us_p50"] > 0 and rows["eager"]["us_p50"] > 0


def test_a_gpu_run_up_to_the_gpu(monkeypatch):
    """All that comes before the device is touched; without one the command says so in one line."""

    class Reached(Exception):
        pass

    def gpu():
        raise Reached

    monkeypatch.setattr(kernels, "Gpu", gpu)
    before = functorch_config.donated_buffer
    try:
        with pytest.raises(Reached):
            kernels.on_gpu(OPERATIONS, 1.0, True)
        assert not functorch_config.donated_buffer
    finally:
        functorch_config.donated_buffer = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", "--device", "cuda"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "kernels: error: there is no NVIDIA GPU here that PyTorch can use: leave --device out\n"

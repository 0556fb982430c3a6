"""The driver of `make gpu`, without a GPU: steps fail, hang and are missing, and each leaves its log."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import FILES, TOTAL, Step, phases, run
from benchmarks.launch_overhead import launch_overhead
from benchmarks.packs import WAYS, packs_command
from benchmarks.throughput import throughput
from benchmarks.training import training
from sign_fast.cli.build_cubins import build_cubins

ROOT = Path(__file__).parents[2]


def python(name, code, **more):
    return Step(name, (sys.executable, "-c", code), more.pop("limit", 60), "all.log", **more)


def test_outcomes_and_logs(tmp_path):
    deadline = time.monotonic() + 60
    steps = [
        python("good", "import os; print('value', os.environ['SIGN_FAST_X'])", environment=(("SIGN_FAST_X", "7"),)),
        python("bad", "import sys; print('to the log'); sys.exit(3)"),
        python("missing", "", missing="compute-sanitizer is not installed"),
    ]
    good, bad, missing = (run(step, tmp_path, deadline) for step in steps)
    assert (good["outcome"], good["failed"]) == ("ok", False)
    assert (bad["outcome"], bad["failed"]) == ("failed (exit status 3)", True)
    assert (missing["outcome"], missing["failed"]) == ("not run: compute-sanitizer is not installed", False)
    assert [file.name for file in tmp_path.iterdir()] == ["all.log"]
    log = (tmp_path / "all.log").read_text()
    assert "== good: ok" in log and "value 7" in log and "== bad: failed" in log and "to the log" in log


def test_a_file_that_only_the_interpreter_runs_has_not_failed(tmp_path):
    deadline = time.monotonic() + 60
    for text, outcome in (
        ("import pytest\npytest.skip('not here', allow_module_level=True)", "ok: all skipped"),
        ("", "failed (exit status 5)"),
    ):
        file = tmp_path / "test_it.py"
        file.write_text(text)
        command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file))
        assert run(Step("tests", command, 60, "all.log"), tmp_path, deadline)["outcome"] == outcome


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path):
    child = f"import subprocess, sys; p = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])"
    step = python("hangs", f"{child}; print(p.pid, flush=True); p.wait()", limit=5)
    facts = run(step, tmp_path, time.monotonic() + 60)
    assert facts["outcome"] == "timed out after 5 s" and facts["failed"]
    pid = int((tmp_path / "all.log").read_text().splitlines()[2])
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # until the system has cleared it away
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def test_no_step_starts_after_the_deadline(tmp_path):
    facts = run(python("late", "print()"), tmp_path, time.monotonic() - 1)
    assert facts["outcome"] == "not run: no time was left" and facts["failed"] and not list(tmp_path.iterdir())


def test_results_are_few_files_and_the_limits_fit(tmp_path):
    plan = phases(tmp_path)
    assert len({step.log for phase in plan for step in phase} | {*FILES}) <= 15
    # the kernels come last and take what is left
    assert sum(max(step.limit for step in phase) for phase in plan[:-1]) <= TOTAL + 25
    assert [step.name for step in plan[-1]] == ["kernels"] and "{left}" in plan[-1][0].command
    names = {step.name for phase in plan for step in phase}
    assert {"build", "graph capture", "compute-sanitizer", "tests: kernels", "tests: engine"} <= names
    assert {"throughput", "latency", "training", "build packs", "packs", "launch overhead"} <= names


@pytest.mark.parametrize("name", ["throughput", "latency"])
def test_the_timings_are_measurements_that_there_are(name, tmp_path):
    step = next(step for phase in phases(tmp_path) for step in phase if step.name == name)
    python, program, *words = step.command
    assert python == sys.executable and program == "benchmarks/throughput.py"
    options = throughput.make_context("throughput.py", words).params  # an unknown option is an error
    assert options["no_ledger"] and options["outdir"] == tmp_path and options["dtype"] == "bfloat16"
    assert options["sweep"] == (name == "throughput") and options["latency"] == (name == "latency")
    assert options["providers"] == "plain,compile,sign_fast" and options["cold_timeout"] < step.limit
    assert {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} == {key for key, _ in step.environment}


def test_training_is_a_measurement_that_there_is(tmp_path):
    step = next(step for phase in phases(tmp_path) for step in phase if step.name == "training")
    python, program, *words = step.command
    assert python == sys.executable and program == "benchmarks/training.py"
    options = training.make_context("training.py", words).params
    assert options["no_ledger"] and options["outdir"] == tmp_path and options["precision"] == "bf16"
    assert options["preset"] == "cifar10-uncond-vp" and options["update"] == "both"
    assert options["seconds"] + options["warm_up_timeout"] < step.limit
    assert {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} == {key for key, _ in step.environment}


def test_a_command_gets_the_seconds_that_are_left(tmp_path):
    step = Step("last", (sys.executable, "-c", "import sys; print('left', sys.argv[1])", "{left}"), 100, "all.log")
    facts = run(step, tmp_path, time.monotonic() + 45.5)
    assert facts["outcome"] == "ok" and facts["command"].endswith(" 25")
    assert "left 25" in (tmp_path / "all.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "make gpu: there is no NVIDIA GPU here that PyTorch can use\n"


def test_packs_are_built_and_measured_by_commands_that_there_are(tmp_path):
    steps = {step.name: step for phase in phases(tmp_path) for step in phase}
    python, *start, name = steps["build packs"].command[:4]
    assert [python, *start, name] == [sys.executable, "-m", "sign_fast.cli", "build-cubins"]
    built = build_cubins.make_context(name, list(steps["build packs"].command[4:])).params
    built["outdir"].mkdir(parents=True)  # which the step before makes
    timed = packs_command.make_context("packs.py", list(steps["packs"].command[2:])).params
    assert built["presets"] == timed["preset"] and built["outdir"] == tmp_path / ".cache" / "packs"
    assert "--packs" in steps["packs"].command and str(built["outdir"]) in steps["packs"].command
    assert len(WAYS) * timed["repeats"] * timed["timeout"] <= steps["packs"].limit + timed["timeout"]
    overhead = steps["launch overhead"].command
    assert launch_overhead.make_context(overhead[1], list(overhead[2:])).params["device"] == "cuda"

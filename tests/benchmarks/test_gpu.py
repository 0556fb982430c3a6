"""The driver of `make gpu`, without a GPU: steps fail, hang and are missing, and each leaves its log."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import FILES, TOTAL, Step, phases, run
from benchmarks.throughput import throughput

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
    step = python("hangs", f"{child}; print(p.pid, flush=True); p.wait()", limit=3)
    facts = run(step, tmp_path, time.monotonic() + 60)
    assert facts["outcome"] == "timed out after 3 s" and facts["failed"]
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
    assert len({step.log for phase in plan for step in phase} | {*FILES}) <= 12
    # the kernels come last and take what is left
    assert sum(max(step.limit for step in phase) for phase in plan[:-1]) <= TOTAL + 25
    assert [step.name for step in plan[-1]] == ["kernels"] and "{left}" in plan[-1][0].command
    names = {step.name for phase in plan for step in phase}
    assert {"build", "graph capture", "compute-sanitizer", "tests: kernels", "tests: engine"} <= names
    assert {"throughput", "latency"} <= names


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

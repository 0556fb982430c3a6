"""Everything that only a GPU can tell, in ten minutes, into one folder: `make gpu` runs this.

Builds the extension, runs the kernel and engine tests on the device, captures each operation in a CUDA graph, runs
compute-sanitizer, times whole generations, training and the kernels. Each step has a time limit and a log; a step that
fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(ROOT))

import click

TOTAL = 565.0  # seconds, of ten minutes
CACHE = ".cache"  # of compilers, in the results folder: what is compiled for throughput is not compiled for latency
FILES = ("summary.json", "sweep.json", "sweep.png", "latency.json", "training.json", "training.png", "kernels.json")
FILES += ("packs.json", "launch_overhead.json")
_TESTS = 120.0  # seconds of what runs at the same time
_OVERHEAD = 20.0  # seconds in which a step starts and ends
NOTHING_COLLECTED = 5  # pytest's exit status for files that only the interpreter runs


@dataclass(frozen=True)
class Step:
    """One command; its output goes to `log` in the results folder, the times of steps with one log are added there.

    "{left}" in the command becomes the seconds that it may take, less those for starting and ending.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    log: str
    environment: tuple[tuple[str, str], ...] = ()
    missing: str = ""  # why it cannot run here


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def _lacks(file: Path) -> str:
    needs = "hypothesis" in file.read_text() and importlib.util.find_spec("hypothesis") is None
    return "hypothesis is not installed" if needs else ""


def _capability() -> str:
    """Of the GPU here, "9.0"; an H100's where there is none."""
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "9.0"


def phases(results: Path) -> list[list[Step]]:
    """The steps of one phase run at the same time; timing has the machine to itself."""
    folder = ROOT / "tests" / "kernels_triton"
    tests = [
        Step(f"tests: {file.name}", _pytest(str(file.relative_to(ROOT))), _TESTS, "tests.log", missing=_lacks(file))
        for file in sorted(folder.glob("test_*.py"))
        if file.name != "test_capture.py"
    ]
    tests.append(Step("tests: kernels", _pytest("tests/kernels"), _TESTS, "tests.log"))
    engine = "" if (ROOT / "tests" / "gpu").is_dir() else "there is no tests/gpu"
    tests.append(Step("tests: engine", _pytest("tests/gpu"), _TESTS, "tests.log", missing=engine))
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    memcheck = (sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    sanitize = Step(
        "compute-sanitizer",
        (*memcheck, sys.executable, "benchmarks/sanitize.py"),
        _TESTS,
        "sanitizer.log",
        (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),  # an allocation each tensor, so that each one's end is watched
        "" if sanitizer else "compute-sanitizer is not installed",
    )
    throughput = (sys.executable, "benchmarks/throughput.py", "--preset", "cifar10-uncond-vp", "--dtype", "bfloat16")
    throughput += ("--device", "cuda", "--no-ledger", "--outdir", str(results))
    sweep = ("--sweep", "--batch", "1,256", "--steps", "4", "--seconds", "24", "--cold-timeout", "110")
    latency = ("--latency", "--seconds", "8", "--cold-timeout", "30")
    cache = tuple(
        (name, str(results / CACHE / name.lower())) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    )
    training = (sys.executable, "benchmarks/training.py", "--preset", "cifar10-uncond-vp", "--precision", "bf16")
    training += ("--device", "cuda", "--no-ledger", "--outdir", str(results), "--seconds", "20")
    training += ("--warm-up-timeout", "70")
    cubin_folder = results / CACHE / "packs"
    cubins = (sys.executable, "-m", "sign_fast.cli", "build-cubins", "--archs", _capability())
    cubins += ("--presets", "cifar10-uncond-vp", "--outdir", str(cubin_folder))
    packs = (sys.executable, "benchmarks/packs.py", "--packs", str(cubin_folder), "--repeats", "1", "--timeout", "40")
    overhead = (sys.executable, "benchmarks/launch_overhead.py", "--device", "cuda")
    kernels = (sys.executable, "benchmarks/kernels.py", "--device", "cuda", "--seconds", "{left}")
    return [
        [Step("build", (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), 70, "build.log")],
        [
            *tests,
            Step("graph capture", _pytest("tests/kernels_triton/test_capture.py"), _TESTS, "tests.log"),
            sanitize,
            Step("build packs", cubins, _TESTS, "packs.log"),
        ],
        [Step("throughput", (*throughput, *sweep), 150, "throughput.log", cache)],
        [Step("latency", (*throughput, *latency), 40, "throughput.log", cache)],
        [Step("training", training, 100, "throughput.log", cache)],
        [Step("packs", (*packs, "--out", str(results / "packs.json")), 95, "packs.log")],
        [Step("launch overhead", (*overhead, "--out", str(results / "launch_overhead.json")), 15, "packs.log")],
        [Step("kernels", (*kernels, "--out", str(results / "kernels.json")), 150, "kernels.log")],
    ]


def run(step: Step, results: Path, deadline: float) -> dict[str, Any]:
    """What became of the step; one whose tool is missing has not failed."""
    facts: dict[str, Any] = {"step": step.name, "command": " ".join(step.command), "seconds": 0.0, "failed": False}
    if step.missing:
        return {**facts, "outcome": f"not run: {step.missing}"}
    seconds = min(step.limit, deadline - time.monotonic())
    if seconds <= 0:
        return {**facts, "outcome": "not run: no time was left", "failed": True}
    command = [word.replace("{left}", str(max(0, int(seconds - _OVERHEAD)))) for word in step.command]
    facts["command"] = " ".join(command)
    started = time.monotonic()
    output = results / f".{step.name.replace('/', ' ')}"
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **dict(step.environment)}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            outcome = "ok" if status == 0 else f"failed (exit status {status})"
            if status == NOTHING_COLLECTED and b"skipped" in output.read_bytes():
                outcome = "ok: all skipped"
        except subprocess.TimeoutExpired:
            outcome = f"timed out after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started as well
            process.wait()
    taken = round(time.monotonic() - started, 1)
    with (results / step.log).open("ab") as log:
        log.write(
            f"== {step.name}: {outcome}, {taken} s\n$ {facts['command']}\n".encode() + output.read_bytes() + b"\n"
        )
    output.unlink()
    return {**facts, "seconds": taken, "outcome": outcome, "failed": not outcome.startswith("ok")}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default="out/gpu", show_default=True)
def gpu(results: Path) -> None:
    """Tests, graph captures, compute-sanitizer and timings of the kernels on this machine's NVIDIA GPU."""
    import torch

    if torch.version.hip is not None or not torch.cuda.is_available():
        click.echo("make gpu: there is no NVIDIA GPU here that PyTorch can use", err=True)
        sys.exit(1)
    from benchmarks import ledger

    deadline = time.monotonic() + TOTAL
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    plan = phases(results)
    for name in {step.log for phase in plan for step in phase} | {*FILES}:
        (results / name).unlink(missing_ok=True)
    outcomes: list[dict[str, Any]] = []
    for phase in plan:
        with ThreadPoolExecutor(len(phase)) as pool:
            for facts in pool.map(lambda step: run(step, results, deadline), phase):
                outcomes.append(facts)
                click.echo(f"{facts['outcome']:<24} {facts['seconds']:>6.1f} s  {facts['step']}")
    shutil.rmtree(results / CACHE, ignore_errors=True)
    summary = {**ledger.environment("cuda"), "steps": outcomes}
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [
        facts["step"] for facts in outcomes if facts["outcome"].startswith(("failed", "timed out", "not run: no"))
    ]
    click.echo(f"results in {results}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    gpu()

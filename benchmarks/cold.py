"""What only a fresh process can tell: the time from its start to the first image, warm-up, peak memory.

A child's figures, in seconds from the moment the parent started it:
first_image_s   until the first batch is done: ready to generate.
import_s        of that, until Python, torch and the library are imported.
ready_s         of that, the rest: network built or loaded, optimised or compiled, first batch done.
warm_up_s       what the first batch took longer than the second.
peak_mb         resident memory at its peak; on CUDA, what torch's allocator held at its peak.

Nothing of torch is imported with this file, so that a child can time the import.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.providers import Case

REPEATS = 3  # of --cold


def peak_rss_mb() -> float:
    """Resident memory of this process at its peak, in MiB."""
    # not getrusage: its maximum is carried over from the parent through exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def child(request: dict[str, Any]) -> dict[str, float]:
    """Run in a fresh process; the request has name, case, batch, threads and started (wall clock)."""
    import torch

    from benchmarks.providers import Case, build_network, make

    imported = time.time() - request["started"]
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    provider = make(request["name"], case, build_network(case), own=True)
    seeds = list(range(request["batch"]))
    before = time.perf_counter()
    provider(seeds)
    first_call = time.perf_counter() - before
    first_image = time.time() - request["started"]
    before = time.perf_counter()
    provider(seeds)
    steady = time.perf_counter() - before
    peak = torch.cuda.max_memory_allocated() / 2**20 if case.device.startswith("cuda") else peak_rss_mb()
    return {
        "import_s": imported,
        "ready_s": first_image - imported,
        "first_image_s": first_image,
        "warm_up_s": max(first_call - steady, 0.0),
        "peak_mb": peak,
    }


def child_main() -> None:
    """The child's whole program: the request is its argument, the figures are its last line."""
    from sign_fast.errors import SignFastError

    try:
        figures = child(json.loads(sys.argv[1]))
    except SignFastError as error:
        sys.exit(str(error))
    print(json.dumps(figures))


def cold(name: str, case: Case, batch: int, timeout: float, threads: int | None = None) -> dict[str, float]:
    """`child` of a provider in its own process.

    Raises:
        RuntimeError: it failed or ran into the time limit; the message is its last line.
    """
    request = {"name": name, "case": vars(case), "batch": batch, "threads": threads, "started": time.time()}
    return in_fresh_process("import benchmarks.cold as c; c.child_main()", request, timeout)


def in_fresh_process(program: str, request: dict[str, Any], timeout: float) -> dict[str, float]:
    """What a Python program prints as its last line, JSON, with the request as its argument.

    Raises:
        RuntimeError: it failed or ran into the time limit; the message is its last line.
    """
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(request)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {timeout:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1][:200] if lines else f"exit status {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


@contextmanager
def compiler_caches(keep: bool = False) -> Iterator[None]:
    """Compilers find empty caches, here and in child processes; with `keep`, a cache that is named stays in use."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name, old in before.items():
            if not (keep and old):
                os.environ[name] = str(Path(folder) / name.split("_")[0].lower())
        try:
            yield
        finally:
            for name, old in before.items():
                os.environ.pop(name)
                if old is not None:
                    os.environ[name] = old


def first_images(
    names: Sequence[str], start: Callable[[str], dict[str, float]], repeats: int = REPEATS
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Medians of `start(name)` over repeats in turns, each with empty compiler caches; and why a name failed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(repeats):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            if name in failed:
                continue
            with compiler_caches():
                try:
                    found[name].append(start(name))
                except RuntimeError as error:
                    failed[name] = str(error)
    medians = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} | {"rounds": len(runs)}
        for name, runs in found.items()
        if name not in failed
    }
    return medians, failed

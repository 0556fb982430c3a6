"""Interleaved timing, and what only a fresh process can tell: time to the first image, warm-up, peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.providers import Case, Provider
from sign_fast.errors import SignFastError

MIN_ROUNDS = 3


def interleaved(providers: Sequence[Provider], batch: int, seconds: float, seed: int) -> dict[str, list[float]]:
    """Seconds of every round and provider; a round runs each provider once, in rotating order, on the same seeds."""
    times: dict[str, list[float]] = {p.name: [] for p in providers}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < MIN_ROUNDS or time.perf_counter() < end:
        seeds = [seed + turn * batch + i for i in range(batch)]
        start = turn % len(providers)
        for provider in [*providers[start:], *providers[:start]]:
            before = time.perf_counter()
            provider(seeds)
            times[provider.name].append(time.perf_counter() - before)
        turn += 1
    return times


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(times: dict[str, list[float]], batch: int) -> dict[str, dict[str, float]]:
    """Per provider: images/s from the median, ms an image at p20/p50/p80, ratios to plain, rounds."""
    out = {}
    for name, values in times.items():
        ms = {f"ms_p{q}": quantile(values, q / 100) / batch * 1000 for q in (20, 50, 80)}
        row = {"images_per_second": 1000 / ms["ms_p50"], **ms, "rounds": len(values)}
        if "plain" in times:
            row["ratio_to_plain"] = statistics.median(times["plain"]) / statistics.median(values)
            pairs = [p / v for p, v in zip(times["plain"], values, strict=True)]
            row["ratio_to_plain_paired"] = statistics.median(pairs)
        out[name] = row
    return out


def _peak_rss_mb() -> float:
    # not getrusage: its maximum is carried over from the parent through exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def child(name: str, case: Case, batch: int, started: float) -> dict[str, float]:
    """Run in a fresh process: first batch since `started` (wall clock), warm-up, peak memory."""
    from benchmarks.providers import build_network

    provider = Provider(name, case, build_network(case))
    seeds = list(range(batch))
    before = time.perf_counter()
    provider(seeds)
    first_call = time.perf_counter() - before
    first_image = time.time() - started
    before = time.perf_counter()
    provider(seeds)
    steady = time.perf_counter() - before
    peak = torch.cuda.max_memory_allocated() / 2**20 if case.device.startswith("cuda") else _peak_rss_mb()
    return {"first_image_s": first_image, "warm_up_s": max(first_call - steady, 0.0), "peak_mb": peak}


def cold(name: str, case: Case, batch: int, timeout: float) -> dict[str, float]:
    """`child` of a provider in its own process.

    Raises:
        RuntimeError: it failed or ran into the time limit; the message is its last line.
    """
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    program = "import benchmarks.measure as m; m.child_main()"
    request = {"name": name, "case": vars(case), "batch": batch, "started": time.time()}
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


def child_main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    try:
        figures = child(request["name"], Case(**request["case"]), request["batch"], request["started"])
    except SignFastError as error:
        sys.exit(str(error))
    print(json.dumps(figures))

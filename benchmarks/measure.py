"""Interleaved timing of providers, and what the times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from benchmarks.providers import Provider

MIN_ROUNDS = 3
TAIL_ROUNDS = 100  # fewer calls have no 99th percentile


def interleaved(
    providers: Sequence[Provider], batch: int, seconds: float, seed: int, rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of every round and provider, `rounds` at least.

    A round runs each provider once, in rotating order, on the same seeds.
    """
    times: dict[str, list[float]] = {p.name: [] for p in providers}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < rounds or time.perf_counter() < end:
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
    """Per provider: images/s from the median, ms an image (p99 from 100 rounds on), ratios to plain, rounds."""
    out = {}
    for name, values in times.items():
        points = (20, 50, 80, 99) if len(values) >= TAIL_ROUNDS else (20, 50, 80)
        ms = {f"ms_p{q}": quantile(values, q / 100) / batch * 1000 for q in points}
        row = {"images_per_second": 1000 / ms["ms_p50"], **ms, "rounds": len(values)}
        if "plain" in times:
            row["ratio_to_plain"] = statistics.median(times["plain"]) / statistics.median(values)
            pairs = [p / v for p, v in zip(times["plain"], values, strict=True)]
            row["ratio_to_plain_paired"] = statistics.median(pairs)
        out[name] = row
    return out

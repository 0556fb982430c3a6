"""Interleaved timing of providers, and what the times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.providers import Provider

MIN_ROUNDS = 3
TAIL_ROUNDS = 100  # fewer calls have no 99th percentile


def interleaved(
    providers: Sequence[Provider], batch: int, seconds: float, seed: int, rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of every round and provider, `rounds` at least.

    A round runs each provider once, in rotating order, on the same seeds.
    """

    def timed(provider: Provider) -> Callable[[int], float]:
        def call(turn: int) -> float:
            seeds = [seed + turn * batch + i for i in range(batch)]
            before = time.perf_counter()
            provider(seeds)
            return time.perf_counter() - before

        return call

    return take_turns({p.name: timed(p) for p in providers}, seconds, rounds)


def take_turns(calls: Mapping[str, Callable[[int], float]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """What each call returned in every round, its seconds; it is given the round's number."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < rounds or time.perf_counter() < end:
        start = turn % len(names)
        for name in [*names[start:], *names[:start]]:
            times[name].append(calls[name](turn))
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

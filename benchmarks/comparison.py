"""Providers beside each other: warmed up, their outputs compared, timed in turns; a row for each of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import click

from benchmarks import cold, roofline
from benchmarks.measure import MIN_ROUNDS, interleaved, summary
from benchmarks.providers import DTYPES, Case, Provider, Reference, build_network, check, make, reference
from sign_fast.errors import SignFastError, first_line

Row = dict[str, Any]


@dataclass
class Run:
    """What all measurements of one run share.

    Args:
        case: with the first number of steps.
        names: of the providers, in order.
        seconds: for timing, at each batch size; in a sweep at all.
        limit: seconds that a provider may take to compile and run first; in a sweep at all batch sizes.
        threads: as asked for, None for the default.
        facts: columns of all rows.
        bounded: whether the fraction of the roofline is reported.
    """

    case: Case
    names: Sequence[str]
    seconds: float
    limit: float
    threads: int | None = None
    facts: Row = field(default_factory=dict)
    bounded: bool = True

    def __post_init__(self) -> None:
        self.net = build_network(self.case)
        dtype = DTYPES[self.case.dtype]
        self.work = roofline.count(self.net, dtype) if self.bounded else None
        self.ceilings = roofline.measure(self.case.device, dtype) if self.bounded else None

    def seeds(self, batch: int) -> list[int]:
        """Of the comparison; other than those of the timing: on numbers that nothing was tuned on."""
        return [1_000_000 + self.case.seed + i for i in range(batch)]

    def row(self, provider: Provider, batch: int, figures: Row) -> Row:
        """The row of a provider that was timed."""
        row = {**self.facts, "steps": provider.case.steps, "batch": batch, "provider": provider.name, **figures}
        if (launches := provider.launches(batch)) is not None:
            row["launches"] = launches
        if (captured := provider.captured_bytes()) is not None:
            row["captured_mb"] = captured / 2**20
        if self.work is not None and self.ceilings is not None:
            row |= self.ceilings.columns(self.work, batch, provider.case.calls(), row["ms_p50"])
        return row


def say(text: str) -> None:
    """Progress, beside the results."""
    click.echo(f"  {text} …", err=True)


class _OutOfTime(BaseException):
    """No Exception: compilers go on after those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds; in the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _OutOfTime:
        raise TimeoutError(f"took longer than {seconds:.0f} s") from None
    finally:
        signal.signal(signal.SIGALRM, before)


def warm(run: Run, name: str, batch: int, limit: float) -> tuple[Provider | None, str]:
    """A provider that has run once, or None and the reason why it cannot run here: only a compiler may fail.

    Raises:
        TimeoutError: it took longer than `limit` seconds.
    """
    say(f"batch {batch}: warming up {name}")
    try:
        with time_limit(limit):
            provider = make(name, run.case, run.net)
            provider(run.seeds(batch))
    except (SignFastError, TimeoutError):
        raise
    except Exception as error:
        if name != "compile":
            raise
        return None, f"{type(error).__name__}: {first_line(error)}"[:200]
    return provider, ""


def compare_outputs(run: Run, provider: Provider, expected: Reference, batch: int) -> None:
    """Refuse to report a provider whose images are wrong."""
    if wrong := check(provider, expected, run.seeds(batch)):
        raise SignFastError(f"nothing is reported, an output is wrong: {wrong}")


def compare(run: Run, batch: int, fresh: bool, rounds: int = MIN_ROUNDS) -> list[Row]:
    """Rows of all providers at one batch size; one that cannot run here has "skipped".

    Args:
        run: what is compared.
        batch: images a call.
        fresh: run each in a fresh process first, with cold caches, which are warm afterwards.
        rounds: that are timed at least.

    Raises:
        SignFastError: an output is wrong, or no provider can run.
    """
    figures: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for name in run.names if fresh else ():
        say(f"batch {batch}: {name} in a fresh process")
        try:
            figures[name] = cold.cold(name, run.case, batch, run.limit, run.threads)
        except RuntimeError as error:
            failed[name] = first_line(error)
    expected = reference(run.case, run.net, run.seeds(batch))
    rows: list[Row] = []
    ready: list[Provider] = []
    for name in run.names:
        try:
            provider, why = (None, failed[name]) if name in failed else warm(run, name, batch, run.limit)
        except TimeoutError as error:
            provider, why = None, str(error)
        if provider is None:
            rows.append({"batch": batch, "provider": name, "skipped": why})
            continue
        compare_outputs(run, provider, expected, batch)
        ready.append(provider)
    if not ready:
        raise SignFastError(f"no provider runs here: {rows[-1]['skipped']}")
    say(f"batch {batch}: timing")
    found = summary(interleaved(ready, batch, run.seconds, run.case.seed, rounds), batch)
    return rows + [run.row(p, batch, {**found[p.name], **figures.get(p.name, {})}) for p in ready]


def first_images(run: Run, batch: int) -> list[Row]:
    """Rows of `cold`: fresh processes only, in turns, medians."""

    def start(name: str) -> dict[str, float]:
        say(f"batch {batch}: {name} in a fresh process")
        return cold.cold(name, run.case, batch, run.limit, run.threads)

    found, failed = cold.first_images(run.names, start)
    if not found:
        raise SignFastError(f"no provider runs here: {first_line(failed[run.names[-1]])}")
    facts = {**run.facts, "steps": run.case.steps, "batch": batch}
    rows: list[Row] = [{"batch": batch, "provider": name, "skipped": why} for name, why in failed.items()]
    return rows + [{**facts, "provider": name, **figures} for name, figures in found.items()]

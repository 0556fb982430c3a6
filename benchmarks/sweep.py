"""Images a second over batch size and steps: every provider as far as time and memory allow."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.comparison import Row, Run, compare_outputs, say, warm
from benchmarks.measure import MIN_ROUNDS, interleaved, summary
from benchmarks.providers import Provider, reference
from sign_fast.errors import SignFastError, first_line

BATCHES = tuple(2**i for i in range(10))
STEPS = 4


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def free_memory(device: str) -> float:
    """Bytes that can still be allocated on the device."""
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return free


@dataclass
class _Series:
    """One provider's way through the batch sizes.

    Args:
        left: seconds that it may still warm up.
        call: seconds of its last second call, one step.
        memory: bytes that this call added at the peak.
        batch: the last.
        ended: why it goes no further.
    """

    left: float
    call: float = 0.0
    memory: float = 0.0
    batch: int = 0
    ended: str = ""

    def does_not_fit(self, batch: int, memory: float) -> str:
        """Why not, judged by the last batch size; empty if it fits."""
        need = self.memory * batch / max(self.batch, 1)
        if need > 0.9 * memory:
            return f"batch {batch} needs about {need / 1e9:.1f} GB, {memory / 1e9:.1f} GB are free"
        return ""

    def takes_too_long(self, batch: int, calls: int, seconds: float) -> str:
        """Why the least number of rounds takes longer than these seconds; empty if it does not."""
        need = MIN_ROUNDS * calls * self.call
        return f"timing batch {batch} takes {need:.2g} s, {max(seconds, 0):.2g} s are left" if need > seconds else ""


@contextmanager
def _recorded(series: _Series, device: str) -> Iterator[None]:
    """Seconds and bytes of what runs inside."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind would hide what this one needs
        with suppress(OSError):  # where that is forbidden the peak is the process's, and the estimate high
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS")
    started = time.perf_counter()
    yield
    series.call = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if cuda else _status_bytes("VmHWM")
    series.memory = float(max(peak - before, 0))


def _start(run: Run, name: str, batch: int, series: _Series) -> tuple[Provider | None, str]:
    """A provider that has run twice, or None and what it lacked: time, memory."""
    started = time.perf_counter()
    try:
        provider, why = warm(run, name, batch, max(series.left, 1.0))
        if provider is not None:
            with _recorded(series, run.case.device):
                provider(run.seeds(batch))
        series.batch = batch
        return provider, why
    except TimeoutError as error:
        return None, f"batch {batch} {error} to start"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        return None, f"batch {batch} is out of memory: {first_line(error)}"[:160]
    finally:
        series.left -= time.perf_counter() - started


def sweep(run: Run, batches: Sequence[int], steps: int) -> list[Row]:
    """Rows of every provider, batch size and 1 … steps steps.

    The run's seconds are for timing: each point takes half its share of what is left, as large batches take more. Its
    limit is for warming up at all batch sizes, for each provider. Where the next batch size would take more than is
    left, or more memory, judged by the last one, a provider's series ends with a row that has "skipped".

    Raises:
        SignFastError: an output is wrong, or no provider can run.
    """
    all_series = {name: _Series(run.limit) for name in run.names}
    calls = sum(replace(run.case, steps=k).calls() for k in range(1, steps + 1))
    timing = run.seconds
    points = len(batches) * steps
    rows: list[Row] = []
    for batch in sorted(batches):
        first = batch == min(batches)
        going = {name: series for name, series in all_series.items() if not series.ended}
        ready: list[Provider] = []
        for name, series in going.items():
            share = timing / len(going)
            # a larger batch takes no less time; the first is timed in any case
            series.ended = "" if first else series.takes_too_long(batch, calls, share)
            series.ended = series.ended or series.does_not_fit(batch, free_memory(run.case.device))
            provider = None
            if not series.ended:
                provider, series.ended = _start(run, name, batch, series)
            if provider is not None and not first:
                series.ended = series.takes_too_long(batch, calls, share)
            if provider is None or series.ended:
                rows.append({"batch": batch, "provider": name, "skipped": series.ended})
            else:
                ready.append(provider)
        for k in range(1, steps + 1) if ready else ():
            some = [provider.with_steps(k) for provider in ready]
            if k == 1 or first:  # what the steps do does not depend on the batch size
                expected = reference(some[0].case, run.net, run.seeds(batch))
                for provider in some:
                    compare_outputs(run, provider, expected, batch)
            say(f"batch {batch}, {k} step(s): timing")
            started = time.perf_counter()
            times = interleaved(some, batch, max(timing, 0) / points / 2, run.case.seed)
            timing -= time.perf_counter() - started
            points -= 1
            found = summary(times, batch)
            for provider in some:
                rows.append(run.row(provider, batch, found[provider.name]))
    if not any("skipped" not in row for row in rows):
        raise SignFastError(f"no provider runs here: {rows[-1]['skipped']}")
    return rows

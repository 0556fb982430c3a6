"""Training's providers beside each other: checked, warmed up, timed in turns; a row for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.comparison import Row, say, time_limit
from benchmarks.measure import MIN_ROUNDS, summary, take_turns
from benchmarks.training_check import check
from benchmarks.training_providers import (
    TrainingCase,
    TrainingProvider,
    allocated_peak_mb,
    make,
    passes_of,
    resident_peak_mb,
)
from sign_fast.errors import SignFastError, first_line


def warm(name: str, case: TrainingCase, iterations: int, timeout: float) -> tuple[TrainingProvider, Row]:
    """The provider after its first iterations, and what they told: passes through networks, memory on CUDA.

    Raises:
        TimeoutError: it took longer than `timeout` seconds.
    """
    figures: Row = {}

    def begin() -> TrainingProvider:
        provider = make(name, case)
        for _ in range(iterations):
            provider()
        return provider

    with time_limit(timeout):
        if (passes := passes_of(name, case)) is not None:
            figures["network_passes"] = passes
        if not case.device.startswith("cuda"):
            return begin(), figures
        provider, figures["peak_mb"] = allocated_peak_mb(case.device, begin)
        return provider, figures


def begun(
    name: str, case: TrainingCase, warm_up: int, timeout: float, memory: bool, threads: int | None
) -> tuple[TrainingProvider | None, Row, str]:
    """The provider, warm, with its figures; or None and why it cannot run here: time, memory or its compiler."""
    known: Row = {}
    if memory and not case.device.startswith("cuda"):
        say(f"{name} in a fresh process")
        try:
            known["peak_mb"] = resident_peak_mb(name, case, warm_up, timeout, threads)
        except RuntimeError as error:
            return None, {}, first_line(error)
    say(f"warming up {name}")
    try:
        provider, figures = warm(name, case, warm_up, timeout)
    except (TimeoutError, torch.cuda.OutOfMemoryError) as error:
        return None, {}, first_line(error)[:200]
    except SignFastError:
        raise
    except Exception as error:
        if name != "compile":
            raise
        return None, {}, f"{type(error).__name__}: {first_line(error)}"[:200]
    if not memory:
        figures.pop("peak_mb", None)
    return provider, known | figures, ""


def compare(
    case: TrainingCase,
    names: Sequence[str],
    seconds: float,
    *,
    warm_up: int,
    timeout: float,
    memory: bool,
    threads: int | None,
    facts: Row,
) -> list[Row]:
    """Rows of all providers; one that cannot run here has "skipped".

    Args:
        case: what is trained.
        names: of the providers, in order.
        seconds: for timing.
        warm_up: iterations before it.
        timeout: seconds that a provider may take for them.
        memory: whether its peak is reported.
        threads: as asked for, None for the default.
        facts: columns of all rows.

    Raises:
        SignFastError: the library's iteration is not that of ordinary autograd, or no provider can run.
    """
    if any(name.startswith("sign_fast") for name in names):
        say("comparing the trainer's iterations with ordinary autograd's")
        if wrong := check(case, names):
            raise SignFastError(f"nothing is reported, an iteration is wrong: {wrong}")
    rows: list[Row] = []
    ready: list[tuple[TrainingProvider, Row]] = []
    for name in names:
        provider, figures, why = begun(name, case, warm_up, timeout, memory, threads)
        if provider is None:
            rows.append({"batch": case.batch, "provider": name, "skipped": why})
        else:
            ready.append((provider, figures))
    if not ready:
        raise SignFastError(f"no provider runs here: {rows[-1]['skipped']}")
    say("timing")
    calls = {provider.name: lambda turn, provider=provider: provider() for provider, _ in ready}
    found = summary(take_turns(calls, seconds, MIN_ROUNDS), case.batch)
    for provider, figures in ready:
        row = {**facts, "batch": case.batch, "dtype": provider.dtype, "provider": provider.name, **found[provider.name]}
        rows.append({**row, "seconds_per_iteration": row["ms_p50"] * case.batch / 1000, **figures})
    return rows

"""Where a sweep's series ends: time, memory, an allocation that fails."""

from __future__ import annotations

import pytest
import torch

from benchmarks import comparison, sweep
from benchmarks.providers import Case
from sign_fast.errors import SignFastError

DIGITS = Case("digits-uncond", "few_step", 1, "float32", "cpu")


def series(**changes):
    return sweep._Series(**{"left": 9.0, "call": 0.5, "memory": 3e9, "batch": 4, **changes})


def test_the_next_batch_is_judged_by_the_last():
    assert series().does_not_fit(8, memory=7e9) == ""
    assert series().does_not_fit(8, memory=6.5e9) == "batch 8 needs about 6.0 GB, 6.5 GB are free"
    assert series().takes_too_long(8, calls=10, seconds=15.0) == ""
    assert series().takes_too_long(8, calls=10, seconds=14.0) == "timing batch 8 takes 15 s, 14 s are left"
    assert series().takes_too_long(8, calls=10, seconds=-1.0).endswith(" 0 s are left")
    assert sweep._Series(1.0).does_not_fit(512, 0.0) == ""  # the first is tried


def test_memory_and_time_of_a_call_are_measured():
    found = series()
    with sweep._recorded(found, "cpu"):
        torch.ones(32 << 20)
    assert 128e6 < found.memory < 1e9 and found.call > 0
    with sweep._recorded(found, "cpu"):
        pass
    assert found.memory < 64e6
    assert sweep.free_memory("cpu") > 64e6


def test_a_series_that_runs_out_of_memory_or_time_ends_and_the_others_go_on(monkeypatch):
    real = comparison.warm
    errors = {
        ("compile", 1): TimeoutError("took longer than 5 s"),
        ("drop_in", 2): torch.OutOfMemoryError("no more"),
        ("sign_fast", 2): RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    }

    def warm(run, name, batch, limit):
        if (name, batch) in errors:
            raise errors[name, batch]
        return real(run, name, batch, limit)

    monkeypatch.setattr(sweep, "warm", warm)
    run = comparison.Run(DIGITS, ["plain", "compile", "drop_in", "sign_fast"], 1.5, 5.0, bounded=False)
    rows = sweep.sweep(run, [1, 2, 4], 1)
    ended = {row["provider"]: (row["batch"], row["skipped"]) for row in rows if "skipped" in row}
    assert ended == {
        "compile": (1, "batch 1 took longer than 5 s to start"),
        "drop_in": (2, "batch 2 is out of memory: no more"),
        "sign_fast": (2, "batch 2 is out of memory: DefaultCPUAllocator: can't allocate memory: you tried"),
    }
    timed = [(row["batch"], row["provider"]) for row in rows if "skipped" not in row]
    assert timed == [(1, "plain"), (1, "drop_in"), (1, "sign_fast"), (2, "plain"), (4, "plain")]
    with pytest.raises(SignFastError, match="no provider runs here: batch 1 took longer"):
        sweep.sweep(comparison.Run(DIGITS, ["compile"], 1.0, 5.0, bounded=False), [1, 2], 1)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def warm(run, name, batch, limit):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(sweep, "warm", warm)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        sweep.sweep(comparison.Run(DIGITS, ["plain"], 1.0, 5.0, bounded=False), [1], 1)


@pytest.mark.parametrize("step", [1, 2])
def test_wrong_images_at_any_number_of_steps_are_not_reported(step, monkeypatch):
    real = sweep.compare_outputs

    def compare(run, provider, expected, batch):
        if provider.case.steps == step:
            with torch.no_grad():
                for p in provider.net.parameters():
                    p.mul_(1.1)
        real(run, provider, expected, batch)

    monkeypatch.setattr(sweep, "compare_outputs", compare)
    with pytest.raises(SignFastError, match="an output is wrong: drop_in"):
        sweep.sweep(comparison.Run(DIGITS, ["drop_in"], 1.0, 60.0, bounded=False), [1], 2)

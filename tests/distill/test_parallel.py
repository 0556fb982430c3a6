"""One process, two under DDP and two under FSDP2: the same distillation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distill import parallel_cases as cases


@pytest.fixture(scope="module")
def alone():
    """Of every case: (trajectory, state) of one process at ITERATIONS, and later of those that are resumed."""
    found = {}
    for case in dict(cases.RUNS):
        updates = cases.iteration_of(case)
        found[case] = cases.run(updates, 0, cases.ITERATIONS), cases.copied(updates.state())
        if case in cases.RESUMED:
            found[case, "later"] = cases.run(updates, cases.ITERATIONS, cases.LATER), updates.state()
    return found


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What two processes found, started once for all cases."""
    folder = tmp_path_factory.mktemp("parallel")
    for case in cases.RESUMED:
        torch.save(alone[case][1], folder / f"{case}-alone.pt")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(cases.__file__)), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


def _agree(found, want):
    """Trajectories, within what float64 makes of sums in another order, which Adam enlarges."""
    assert len(found) == len(want)
    for now, then in zip(found, want, strict=True):
        assert now.keys() == then.keys()
        for name, value in then.items():
            assert abs(now[name] - value) <= 1e-9 * abs(value), (name, now[name], value)


def _tensors(state, kinds=()):
    """(kind, tensor) of all weights, averages and moments."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, (*kinds, name))
        elif name in ("exp_avg", "exp_avg_sq", "step"):
            yield (kinds[0], name), value
        elif isinstance(value, torch.Tensor):
            yield kinds, value


def _same_state(found, want):
    """Every element, to 1e-9 of the largest of its kind."""
    found, want = list(_tensors(found)), list(_tensors(want))
    assert [kind for kind, _ in found] == [kind for kind, _ in want]
    kinds = {("fake", "net"), ("student", "net"), ("ema",)}
    kinds |= {(net, name) for net in ("fake", "student") for name in ("exp_avg", "exp_avg_sq", "step")}
    assert {kind for kind, _ in want} == kinds
    largest = dict.fromkeys(kinds, 0.0)
    for kind, value in want:
        largest[kind] = max(largest[kind], float(value.abs().max()))
    for (kind, a), (_, b) in zip(found, want, strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-9 * largest[kind], kind


def test_networks_are_laid_out_as_they_are_loaded():
    updates = cases.iteration_of("sign")
    for net in (updates.networks.fake, updates.networks.student):
        assert any(not p.is_contiguous() for p in net.parameters())


@pytest.mark.parametrize(("case", "parallel"), cases.RUNS)
def test_trajectory(alone, together, case, parallel):
    assert len(together[case, parallel]) == cases.ITERATIONS
    _agree(together[case, parallel], alone[case][0])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", cases.RESUMED)
def test_a_state_of_two_processes_is_that_of_one(alone, together, case, parallel):
    _same_state(together[case, parallel, "state"], alone[case][1])


@pytest.mark.parametrize(("case", "origin", "parallel"), cases.MOVES)
def test_two_processes_go_on_from_a_state_of_others(alone, together, case, origin, parallel):
    trajectory, state = together[case, origin, parallel]
    _agree(trajectory, alone[case, "later"][0])
    _same_state(state, alone[case, "later"][1])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", cases.RESUMED)
def test_one_process_goes_on_from_a_state_of_two(alone, together, case, parallel):
    trajectory, state = cases.go_on(case, together[case, parallel, "state"])
    _agree(trajectory, alone[case, "later"][0])
    _same_state(state, alone[case, "later"][1])


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("case", ["sida", "sida-combined"])
def test_a_batch_in_parts_is_the_whole(alone, case, parts):
    """The case itself, and with a regression term and several calls of the student."""
    updates = cases.iteration_of(case, accumulation=parts)
    _agree(cases.run(updates, 0, cases.ITERATIONS), alone[case][0])
    _same_state(updates.state(), alone[case][1])
    found, want = (cases.iteration_of(case, accumulation=n, steps=3, reg=1.0) for n in (parts, 8))
    _agree(cases.run(found, 0, 1), cases.run(want, 0, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_laid_out_as_their_weights(alone, layout):
    updates = cases.iteration_of("sign")
    state = cases.copied(alone["sign"][1])
    for values in state["fake"]["optimizer"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if values[name].ndim == 4:
                values[name] = values[name].contiguous(memory_format=layout)
    updates.load_state(state)
    for p in updates.fake.weights:
        known = updates.fake.optimizer.state[p]
        assert known["exp_avg"].stride() == known["exp_avg_sq"].stride() == p.stride()

"""Iterations as graphs, with a stand-in for CUDA graphs on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from sign_fast.distill import iteration as iteration_module
from sign_fast.distill.capture import CapturedUpdates
from sign_fast.distill.trained import Trained
from sign_fast.errors import SignFastError
from tests.distill import parallel_cases as cases
from tests.stand_in_capture import TapeStandIn

CASES = {
    "sid-combined": {},
    "sid-few-step": {"steps": 2, "accumulation": 1},
    "sida": {"adversarial_kimg": 0.024, "student_kimg": 0.024},  # three iterations of the fake score alone
    "sida-combined": {},
    "sign": {"checkpointing": False},
}
ITERATIONS = 7


def captured(case, monkeypatch, **changes):
    """A case as it runs on a GPU, but for the device."""
    monkeypatch.setattr(iteration_module, "_captures", lambda *_: True)
    monkeypatch.setattr(iteration_module, "CapturedUpdates", lambda *given: CapturedUpdates(*given, TapeStandIn))
    return cases.iteration_of(case, torch.float32, **changes)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_a_run_without_graphs(case, monkeypatch):
    changes = {"lr_rampup_kimg": 0.064, **CASES[case]}
    plain = cases.iteration_of(case, torch.float32, **changes)
    want = cases.run(plain, 0, ITERATIONS)
    graphs = captured(case, monkeypatch, **changes)
    assert cases.run(graphs, 0, ITERATIONS) == want
    for a, b in ((graphs.student, plain.student), (graphs.fake, plain.fake)):
        assert all(torch.equal(p, q) for p, q in zip(a.weights, b.weights, strict=True))
    averages = zip(graphs.networks.ema.parameters(), plain.networks.ema.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in averages)
    assert graphs.graphs._capture.attempts >= 1
    assert all(isinstance(t.optimizer.param_groups[0]["lr"], torch.Tensor) for t in (graphs.fake, graphs.student))


def test_a_graph_for_every_kind_of_iteration(monkeypatch):
    updates = captured("sid-few-step", monkeypatch, steps=2, accumulation=1)
    cases.run(updates, 0, 8)
    runs = updates.graphs._runs
    assert {key[0] for key in runs} == {1, 2}
    assert set(runs.values()) == {2} and updates.graphs._capture.attempts == len(updates.graphs._graphs) == 2


def test_dropout_is_drawn_anew(monkeypatch):
    kwargs = {**cases.NETWORK, "dropout": 0.5}
    monkeypatch.setattr(cases, "NETWORK", kwargs)
    plain = cases.iteration_of("sid", torch.float32)
    want = cases.run(plain, 0, 4)
    assert cases.run(captured("sid", monkeypatch), 0, 4) == want


def test_a_loaded_state_is_captured_anew(monkeypatch):
    updates = captured("sid", monkeypatch)
    cases.run(updates, 0, 3)
    middle = copy.deepcopy(updates.state())
    want = cases.run(updates, 3, 6)
    assert updates.graphs._graphs
    updates.load_state(middle)
    assert not updates.graphs._graphs
    assert cases.run(updates, 3, 6) == want


def test_an_iteration_that_synchronises_is_told_where(monkeypatch):
    updates = captured("sid", monkeypatch)
    step = Trained.step

    def waits(self):
        norm = step(self)
        norm.item()
        return norm

    monkeypatch.setattr(Trained, "step", waits)
    cases.run(updates, 0, 2)
    with pytest.raises(SignFastError, match=r"cannot be captured: aten::_local_scalar_dense .* turn capture off") as e:
        cases.run(updates, 2, 3)
    assert f"{__file__}:" in str(e.value)


def test_where_there_are_no_graphs():
    assert cases.iteration_of("sid").graphs is None
    with pytest.raises(SignFastError, match="no CUDA graphs on cpu"):
        cases.iteration_of("sid", capture=True)
    settings = cases.iteration_of("sid", checkpointing=True).settings
    networks = cases.iteration_of("sid").networks
    cuda = torch.device("cuda")
    assert iteration_module._captures(settings, networks, cuda, 1)
    assert not iteration_module._captures(settings, networks, cuda, 2)
    next(m for m in networks.student.modules() if hasattr(m, "skip_scale")).dropout = 0.1
    assert not iteration_module._captures(settings, networks, cuda, 1)

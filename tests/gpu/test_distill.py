"""Distillation on a GPU: weights with and without graphs are the same to the bit, and nothing waits for the GPU."""

from __future__ import annotations

import pytest
import torch

from sign_fast.distill.iteration import Iteration
from sign_fast.distill.networks import build_networks, load_teacher
from sign_fast.distill.settings import DistillSettings

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

BATCH = 16
SIDA = {"adversarial_kimg": 0.048, "student_kimg": 0.048}
CASES = {
    "sid": ("sid", {}),
    "sid-combined": ("sid", {"update": "combined", "accumulation": 2}),
    "sid-few-step": ("sid", {"steps": 2, "dropout": 0.3}),
    "sida": ("sida", SIDA),
    "sida-combined": ("sida", {**SIDA, "update": "combined"}),
    "sign": ("sign", {"reg": 1.0, "fake_updates": 2}),
    "sign-combined": ("sign", {"update": "combined", "checkpointing": True}),
}


def updates_of(case, **changes):
    method, settings = CASES[case]
    settings = {"batch": BATCH, "kimg": 1.0, "lr": 1e-4, "lr_rampup_kimg": 0.1, **settings, **changes}
    s = DistillSettings(method, "digits-cond", **settings)
    teacher, cls, kwargs = load_teacher(s.teacher, torch.device("cuda"))
    networks = build_networks(teacher, cls, kwargs, time_free=method == "sign", dropout=s.dropout)
    return Iteration(s, networks)


def given(updates, number):
    """Images, labels and pairs on the device."""
    if updates.settings.method == "sid":
        return {}
    generator = torch.Generator("cuda").manual_seed(number)
    shape = (BATCH, *updates.method.shape)
    images = torch.rand(shape, generator=generator, device="cuda").mul_(2).sub_(1)
    labels = torch.nn.functional.one_hot(torch.arange(BATCH, device="cuda") % 10, 10).float()
    found = {"images": images, "labels": labels}
    if updates.settings.reg:
        found["pairs"] = (torch.randn(shape, generator=generator, device="cuda"), images, labels)
    return found


def run(updates, start, stop):
    return [updates.run(number, **given(updates, number)) for number in range(start, stop)]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_a_run_without_graphs(case, precision):
    plain = updates_of(case, capture=False, precision=precision)
    graphs = updates_of(case, capture=True, precision=precision)
    want, found = run(plain, 0, 8), run(graphs, 0, 8)
    assert graphs.graphs is not None and graphs.graphs._graphs and plain.graphs is None
    for a, b in zip(found, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name].nan_to_num(), b[name].nan_to_num()), name
    for a, b in ((graphs.fake, plain.fake), (graphs.student, plain.student)):
        assert all(torch.equal(p, q) for p, q in zip(a.weights, b.weights, strict=True))
    graphs.graphs.clear()


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_gpu(case, precision, capture):
    updates = updates_of(case, capture=capture, precision=precision)
    run(updates, 0, 8)  # compiles, captures, and lets student and adversarial terms set in
    inputs = [given(updates, number) for number in range(8, 10)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [updates.run(number, **inputs[number - 8]) for number in range(8, 10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(v) for row in losses for name, v in row.items() if name.startswith("loss"))
    if updates.graphs is not None:
        updates.graphs.clear()


def test_bfloat16_trains_as_float32_does():
    want, found = (run(updates_of("sid", precision=p), 0, 6) for p in ("fp32", "bf16"))
    for a, b in zip(found, want, strict=True):
        assert abs(float(a["loss_fake"]) - float(b["loss_fake"])) <= 16 * 2**-8 * abs(float(b["loss_fake"]))


def test_the_graph_is_in_use_by_default():
    updates = updates_of("sid")
    run(updates, 0, 4)
    assert len(updates.graphs._graphs) == 1
    updates.graphs.clear()

"""The engine on a GPU: the bytes of a replay and of the same without graphs, and nothing that waits."""

from __future__ import annotations

import copy

import pytest
import torch

from sign_fast import ImageGenerator, models

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

CASES = [("edm", 4, {}), ("edm", 4, {"S_churn": 10.0}), ("ablation", 3, {"solver": "euler"}), ("few_step", 3, {})]
SEEDS = [3, 1, 4, 15, 9]


def generator(name="digits-cond", dtype=torch.float32, noise="torch"):
    return ImageGenerator.from_pretrained(name, "cuda", dtype, noise)


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["digits-uncond", "digits-cond"])
def test_byte_identical_with_and_without_graphs(name, dtype, noise, monkeypatch):
    made = generator(name, dtype, noise)
    for sampler, steps, options in CASES:
        monkeypatch.delenv("SIGN_FAST_DISABLE_GRAPHS", raising=False)
        replays = [made(SEEDS, steps, sampler=sampler, **options) for _ in range(2)]
        assert torch.equal(*replays)
        monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
        assert torch.equal(made(SEEDS, steps, sampler=sampler, **options), replays[0])
    made.engine.graphs.clear()


@pytest.mark.parametrize("name", ["digits-uncond", "digits-cond"])
def test_students_without_a_time_input(name, monkeypatch):
    student = models.IdempotentPrecond.from_teacher(models.load(name, "cuda"), sigma=5.0).eval()
    made = ImageGenerator(student)
    for sampler, options in (("recursive", {"steps": 3}), ("multistep", {"noise_levels": [0.5]})):
        monkeypatch.delenv("SIGN_FAST_DISABLE_GRAPHS", raising=False)
        image = made(SEEDS, sampler=sampler, **options)
        monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
        assert torch.equal(made(SEEDS, sampler=sampler, **options), image)
    made.engine.graphs.clear()


def test_step_sizes_labels_and_seeds_are_inputs():
    made, fresh = generator(), generator()
    for options in ({"rho": 7}, {"rho": 3}, {"sigma_max": 20.0}):
        for labels in (None, [1, 2, 3, 4, 5]):
            image = made(SEEDS, 4, labels, "edm", **options)
            fresh.engine.graphs.clear()
            assert torch.equal(image, fresh(SEEDS, 4, labels, "edm", **options))
    assert made.engine.graphs.statistics()["captures"] == 1
    made.engine.graphs.clear()
    fresh.engine.graphs.clear()


def test_update_in_place_keeps_the_graph():
    net = models.load("digits-cond", "cuda")
    further = copy.deepcopy(net)
    with torch.no_grad():
        for p in further.parameters():
            p.mul_(1.01).add_(0.002)
    made = ImageGenerator(net, "teacher")
    first = made(SEEDS, 4)
    made.net.update(further)
    second = made(SEEDS, 4)
    assert made.engine.graphs.statistics()["captures"] == 1
    want = ImageGenerator(further, "teacher")(SEEDS, 4)
    assert torch.equal(second, want) and not torch.equal(first, second)
    made.engine.graphs.clear()


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_nothing_waits_from_the_call_to_the_copy(noise):
    """Seeds and labels, the draws, the replay and the copy to pinned memory are only put into the stream."""
    made = generator(noise=noise)
    calls = [{"labels": None}, {"labels": [1, 2, 3, 4, 5]}]
    want = [made(SEEDS, 4, sampler="edm", S_churn=10.0, **call).cpu().numpy() for call in calls]
    for call in calls:
        made.submit(SEEDS, 4, sampler="edm", S_churn=10.0, **call).result()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        transfers = [made.submit(SEEDS, 4, sampler="edm", S_churn=10.0, **call) for call in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for transfer, array in zip(transfers, want, strict=True):
        assert (transfer.result() == array).all()
    made.engine.graphs.clear()

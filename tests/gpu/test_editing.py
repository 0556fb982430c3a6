"""Editing on a GPU: one replay an edit, the bytes of the same without graphs, and nothing that waits."""

from __future__ import annotations

import pytest
import torch

from sign_fast import ImageGenerator, models
from sign_fast.editing import KnownPixels, PatchMeans, project, sdedit
from sign_fast.editing.tasks import centre_unknown

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

SEEDS = [3, 1, 4, 15, 9]
CONSTRAINTS = [None, KnownPixels(centre_unknown(8)), PatchMeans(2)]


def student():
    return ImageGenerator(models.IdempotentPrecond.from_teacher(models.load("digits-uncond", "cuda"), sigma=5.0).eval())


def images(seed=0):
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_byte_identical_with_and_without_graphs(constraint, monkeypatch):
    made, teacher = student(), ImageGenerator.from_pretrained("digits-uncond", "cuda")
    options = {"constraint": constraint, "seeds": SEEDS, "output": "uint8"}
    for y in (images(), images(1), images(1).cuda()):
        monkeypatch.delenv("SIGN_FAST_DISABLE_GRAPHS", raising=False)
        replays = project(made, y, rounds=2, **options), sdedit(teacher, y, noise_level=0.5, calls=3, **options)
        monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
        assert torch.equal(project(made, y, rounds=2, **options), replays[0])
        assert torch.equal(sdedit(teacher, y, noise_level=0.5, calls=3, **options), replays[1])
    assert made.engine.graphs.statistics()["captures"] == 1
    made.engine.graphs.clear()
    teacher.engine.graphs.clear()


def test_as_on_the_cpu():
    made = student()
    host = models.IdempotentPrecond.from_teacher(models.load("digits-uncond", "cpu"), sigma=5.0).eval()
    y = images()
    for constraint in CONSTRAINTS:  # at τ = 0 no noise is drawn, which is another on each device
        got = project(made, y, noise_level=0.0, rounds=1, constraint=constraint)
        want = project(host, y, noise_level=0.0, rounds=1, constraint=constraint)
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-3)
    made.engine.graphs.clear()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_nothing_waits_between_the_call_and_the_result(constraint):
    made, y = student(), images()
    want = project(made, y, rounds=2, constraint=constraint, seeds=SEEDS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = project(made, y, rounds=2, constraint=constraint, seeds=SEEDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    made.engine.graphs.clear()

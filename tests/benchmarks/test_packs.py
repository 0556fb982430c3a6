"""The benchmark of packs: what makes its figures invalid, and that it needs a GPU."""

from __future__ import annotations

import os
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import packs


def facts(image="a", served=1):
    return {"image": image, "served": served, "first_image_s": 1.0, "import_s": 0.5, "ready_s": 0.5}


def test_runs_that_do_not_agree_are_not_reported():
    good = {"pack": [facts(), facts()], "jit": [facts(served=0)], "compile": [facts("b", 0)]}
    assert packs.wrong(good) == ""
    assert "the same image" in packs.wrong({**good, "jit": [facts("b", 0)]})
    assert "nothing was launched" in packs.wrong({**good, "pack": [facts(served=0)]})
    assert "launched from packs" in packs.wrong({**good, "jit": [facts()]})


def test_every_way_sees_its_environment(monkeypatch, tmp_path):
    seen = {}

    def fresh(program, request, timeout):
        names = ("SIGN_FAST_PACKS", "SIGN_FAST_NO_JIT", "TRITON_CACHE_DIR")
        seen[request["provider"], os.environ.get("SIGN_FAST_NO_JIT")] = [os.environ.get(name) for name in names]
        return facts()

    monkeypatch.setattr(packs.cold, "in_fresh_process", fresh)
    monkeypatch.delenv("SIGN_FAST_NO_JIT", raising=False)
    monkeypatch.setenv("SIGN_FAST_PACKS", "before")
    for way in packs.WAYS:
        packs.start(way, tmp_path, {}, 1)
    assert seen["sign_fast", "1"][:2] == [str(tmp_path), "1"] and seen["sign_fast", None][:2] == ["none", None]
    assert seen["compile", None][0] == "none" and os.environ["SIGN_FAST_PACKS"] == "before"
    assert len({folder for *_, folder in seen.values()}) == 3


def test_a_child_reports_seconds_and_its_image():
    case = {
        "preset": "digits-uncond",
        "sampler": "few_step",
        "steps": 1,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
    }
    request = {"provider": "sign_fast", "case": case, "started": time.time()}
    first, second = packs.child(request), packs.child(request)
    assert first["image"] == second["image"] and len(first["image"]) == 64 and first["served"] == 0
    assert first["first_image_s"] == pytest.approx(first["import_s"] + first["ready_s"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_it_needs_a_gpu(tmp_path):
    done = CliRunner().invoke(packs.packs_command, ["--packs", str(tmp_path)])
    assert done.exit_code == 1 and "no NVIDIA GPU" in done.output

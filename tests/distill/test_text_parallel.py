"""One process, two under DDP and two under FSDP2: the same text-to-image run."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sign_fast.distill.text_to_image.trainer import TextDistiller
from tests.distill import text_cases as cases
from tests.distill.text_cases import CPU, parallel_settings, write_images, write_prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(of one process, of two): a run's folder a case, and a case and kind of parallelism."""
    root = tmp_path_factory.mktemp("parallel")
    write_prompts(root / "prompts.txt")
    write_images(root / "data")
    for kind, _ in cases.PARALLEL.values():
        shutil.copytree(cases.teacher(kind), root / kind)
    (root / "two").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", cases.__file__]
    done = subprocess.run(
        [*command, "together", str(root), str(root / "two")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr
    assert len(list((root / "cache").rglob("text-*/rows-*"))) > 4
    shutil.rmtree(root / "cache")  # one process makes its own
    for case in cases.PARALLEL:
        with pytest.MonkeyPatch.context() as patch:
            cases.leave_away_what_takes_long(patch.setattr)
            TextDistiller(parallel_settings(root, case, "ddp"), root / "one" / case, CPU).run()
    return root / "one", root / "two"


def rows(folder, table):
    with (folder / f"{table}.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("case", "parallel"), cases.RUNS)
def test_two_processes_follow_one(folders, case, parallel):
    one, two = folders[0] / case, folders[1] / f"{case}-{parallel}"
    for table in ("metrics", "quality"):
        found, want = rows(two, table), rows(one, table)
        assert len(found) == len(want) > 0
        for a, b in zip(found, want, strict=True):
            # float32's sums in another order, which Adam's first steps enlarge
            assert a == pytest.approx(b, rel=2e-4, abs=1e-4), table
    weights = [load_file(f / "network" / "unet" / "diffusion_pytorch_model.safetensors") for f in (two, one)]
    assert weights[0].keys() == weights[1].keys()
    for name, want in weights[1].items():
        assert float((weights[0][name] - want).abs().max()) <= 2e-4 * max(1.0, float(want.abs().max())), name


@pytest.mark.parametrize("case", ["lora"])
def test_one_process_goes_on_from_the_state_of_two(folders, case, tmp_path):
    found = []
    for name in (folders[0] / case, folders[1] / f"{case}-fsdp"):
        state = torch.load(name / "state-00000002.pt", weights_only=True)["updates"]
        found.append(state)
    shapes = [
        {net: {name: tuple(t.shape) for name, t in state[net]["net"].items()} for net in ("fake", "student")}
        for state in found
    ]
    assert shapes[0] == shapes[1]
    folder = shutil.copytree(folders[1] / f"{case}-fsdp", tmp_path / "run")
    s = parallel_settings(folders[0].parent, case, "ddp")
    run = TextDistiller(s, folder, CPU)
    assert run.iteration == 2
    assert all(torch.isfinite(v) for v in run.step().values())
    run.close()

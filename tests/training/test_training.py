"""Training: losses and schedules by formula, exact resume after a kill, two processes, damaged states."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sign_fast.errors import SignFastError
from sign_fast.models.presets import preset
from sign_fast.training.ema import ema_beta
from sign_fast.training.loop import Trainer, TrainSettings
from sign_fast.training.losses import EDMLoss, VELoss, VPLoss, denoising_loss
from sign_fast.training.schedule import learning_rate_factor

CPU = torch.device("cpu")


def settings(**changes):
    cls, kwargs = preset("digits-cond" if changes.pop("cond", False) else "digits-uncond")
    kwargs |= {"model_channels": 8, "dropout": 0.1}
    base = {"batch": 16, "kimg": 0.16, "lr_rampup_kimg": 0.05, "log_every": 1, "save_every": 3, "seed": 7}
    return TrainSettings("digits", cls, kwargs, **{**base, **changes})


def weights(folder: Path):
    return load_file(folder / "network" / "model.safetensors")


def losses(folder: Path):
    with (folder / "metrics.csv").open() as file:
        return [(row["iteration"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Trainer(settings(), folder, CPU).run()
    return folder


def test_run_writes_what_it_promises(finished):
    assert [row[0] for row in losses(finished)] == [str(i) for i in range(1, 11)]
    assert sorted(p.name for p in finished.glob("state-*")) == ["state-00000009.pt", "state-00000010.pt"]
    assert (finished / "settings.json").exists() and (finished / "network" / "README.md").exists()
    assert any((finished / "tensorboard").iterdir())


class Killed(Exception):
    pass


def test_resume_is_exact(finished, tmp_path):
    def die(progress):
        if progress.iteration == 8:
            raise Killed

    with pytest.raises(Killed):
        Trainer(settings(), tmp_path, CPU).run(die)
    again = Trainer(settings(), tmp_path, CPU)
    assert again.iteration == 6  # the last saved state
    again.run()
    assert losses(tmp_path) == losses(finished)
    assert same(weights(tmp_path), weights(finished))


def test_damaged_newest_state_falls_back(finished, tmp_path):
    Trainer(settings(kimg=0.096), tmp_path, CPU).run()
    newest = tmp_path / "state-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"state-00000006.pt is damaged"):
        again = Trainer(settings(), tmp_path, CPU)
    assert again.iteration == 3
    again.run()
    assert same(weights(tmp_path), weights(finished))


def test_a_run_whose_states_are_all_damaged_is_left_as_it_is(finished, tmp_path):
    Trainer(settings(kimg=0.048), tmp_path, CPU).run()
    for path in tmp_path.glob("state-*"):
        path.write_bytes(path.read_bytes()[:1000])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    with pytest.raises(SignFastError, match=r"all damaged .*choose another --outdir"):
        Trainer(settings(), tmp_path, CPU)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"} == before


def test_other_settings_are_refused(finished):
    with pytest.raises(SignFastError, match="holds a run with another lr"):
        Trainer(settings(lr=0.5), finished, CPU)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    plain = settings(kimg=0.032)
    plain.kwargs["dropout"] = 0
    parts = settings(kimg=0.032, accumulation=4)
    parts.kwargs["dropout"] = 0
    Trainer(plain, tmp_path / "a", CPU).run()
    Trainer(parts, tmp_path / "b", CPU).run()
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision, tmp_path):
    Trainer(settings(precision=precision, kimg=0.048), tmp_path, CPU).run()
    assert all(math.isfinite(float(row[1])) for row in losses(tmp_path))
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values())


def command(folder, *extra):
    words = ["train", "--data", "digits", "--preset", "digits-uncond", "--outdir", str(folder), "--batch", "16"]
    return ["-m", "sign_fast.cli", *words, "--duration", "0.0008", "--log-every", "1", "--snap-every", "5", *extra]


_KILLED = """
import os, signal
from sign_fast.cli.main import main
from sign_fast.training.loop import Trainer

step, steps = Trainer._step, []

def killed(self, *batch):
    steps.append(None)
    if len(steps) == 8:  # a state of 5 iterations is there
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)

Trainer._step = killed
main()
"""


def test_kill_dash_nine_and_again(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([sys.executable, *command(whole)], check=True, capture_output=True, env=environment)
    killed = subprocess.run([sys.executable, "-c", _KILLED, *command(cut)[2:]], capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run([sys.executable, *command(cut)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert same(weights(whole), weights(cut))


def test_two_processes_follow_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *command(one)], check=True, capture_output=True, env=environment)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, *command(two)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for a, b in zip(losses(one), losses(two), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), rel=2e-3)  # sums in another order, amplified by Adam


def test_ema_formula():
    assert ema_beta(256, 0, 500_000, 0.05) == 0.0  # the first update copies
    assert ema_beta(256, 10**9, 500_000, 0.05) == 0.5 ** (256 / 500_000)
    assert ema_beta(256, 1000, 500_000, 0.05) == 0.5 ** (256 / 50)
    assert ema_beta(256, 0, 500_000, None) == 0.5 ** (256 / 500_000)


def test_learning_rate_formula():
    assert learning_rate_factor(0, 1000, 10_000, "constant") == 0
    assert learning_rate_factor(500, 1000, 10_000, "constant") == 0.5
    assert learning_rate_factor(9000, 1000, 10_000, "constant") == 1
    assert learning_rate_factor(5000, 0, 10_000, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(10_000, 1000, 10_000, "cosine") == pytest.approx(0)


def test_losses_by_formula():
    normal, uniform = torch.tensor(0.5), torch.tensor(0.25)
    sigma, weight = EDMLoss().draw(normal, uniform)
    assert sigma.item() == pytest.approx(math.exp(1.2 * 0.5 - 1.2))
    assert weight.item() == pytest.approx((sigma.item() ** 2 + 0.25) / (sigma.item() * 0.5) ** 2)
    sigma, weight = VELoss().draw(normal, uniform)
    assert sigma.item() == pytest.approx(0.02 * 5000**0.25, rel=1e-5)
    assert weight.item() == pytest.approx(1 / sigma.item() ** 2)
    sigma, weight = VPLoss().draw(normal, uniform)
    t = 1 + 0.25 * (1e-5 - 1)
    assert sigma.item() == pytest.approx(math.sqrt(math.exp(9.95 * t * t + 0.1 * t) - 1), rel=1e-5)


def test_a_perfect_denoiser_has_no_loss():
    images = torch.randn(4, 1, 8, 8)
    got = denoising_loss(EDMLoss(), lambda x, sigma, labels: images, images, None, torch.Generator().manual_seed(0))
    assert torch.equal(got, torch.zeros(4))


def test_diverging_run_stops_with_the_reason(tmp_path):
    with pytest.raises(SignFastError, match=r"the loss is (nan|inf).*lower --lr or use --precision fp32$"):
        Trainer(settings(lr=1e30, lr_rampup_kimg=0, kimg=1), tmp_path, CPU).run()  # before any state is saved

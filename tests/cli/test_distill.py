"""sign-fast distill: runs, what is printed, torchrun, and everything that can be wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.cli.test_generate import run
from tests.tiny_runs import write_teacher

SHORT = ["--batch", 8, "--duration", 0.000032, "--log-every", 1, "--quality-every", 2, "--quality-images", 20]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "network")


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_recipe_from_teacher_to_images(teacher, tmp_path, capfd):
    words = ["distill", "--recipe", "digits-sid-4step", "--teacher", teacher, "--outdir", tmp_path / "run", *SHORT]
    words += ["--pairs", 64]  # the recipe's own are minutes of work
    status, out, err = run(capfd, *words)
    assert status == 0, err
    assert out.startswith("distilled to 4 iterations: ") and "; best " in out and "quality_4=" in err
    config = json.loads((tmp_path / "run" / "network" / "config.json").read_text())
    assert config["role"] == "student" and config["sampling"] == {"steps": 4, "sigma": 2.5}
    assert config["trained"]["teacher"] == teacher and config["trained"]["images"] == 32
    network = tmp_path / "run" / "best"
    assert run(capfd, "generate", "--network", network, "--outdir", tmp_path / "out", "--num", 2)[0] == 0
    status, out, _ = run(capfd, "evaluate", "--network", network, "--num", 20, "--json")
    facts = json.loads(out)
    recorded = json.loads((network / "config.json").read_text())["quality"]
    assert facts["steps"] == 4 and facts["Fréchet distance"] == pytest.approx(recorded["Fréchet distance"], rel=1e-3)
    status, out, err = run(capfd, *words)  # once more: there is nothing to do
    assert status == 0 and out.startswith("distilled to 4 iterations")


def test_sign_without_data_says_what_it_trains_on(teacher, tmp_path, capfd):
    words = ["distill", "--method", "sign", "--teacher", teacher, "--outdir", tmp_path / "run", *SHORT]
    status, _, err = run(capfd, *words, "--pairs", 16, "--lr", 1e-3, "--reg", 0.5, "--no-xflip")
    assert status == 0, err
    assert "no --data: sign trains on 16 samples of the teacher" in err
    assert "samples of the teacher" in (tmp_path / "run" / "network" / "README.md").read_text()
    status, out, _ = run(capfd, "evaluate", "--network", tmp_path / "run" / "network", "--num", 20)
    assert status == 0 and "steps 1, sampler recursive" in out


def test_dry_run_prints_the_settings_and_leaves_no_trace(teacher, tmp_path, capfd):
    words = ["distill", "--recipe", "cifar10-cond", "--method", "sida", "--teacher", teacher, "--data", "digits"]
    more = ["--batch-gpu", 48, "--beta1", 0.5, "--ema", 0.25, "--duration", 1, "--lsg", 10, "--lsg-gan", 0.1]
    more += ["--student-after", 0.3, "--adversarial-after", 2, "--parallel", "fsdp"]
    status, out, err = run(capfd, *words, *more, "--outdir", tmp_path / "run", "--dry-run")
    assert status == 0, err
    found = json.loads(out)
    want = {"method": "sida", "alpha": 1.0, "lr": 1e-5, "batch": 256, "accumulation": 8, "betas": [0.5, 0.999]}
    want |= {"student_kimg": 300, "adversarial_kimg": 2000}
    assert "the adversarial loss never sets in: it would at 2000 kimg, the run ends at 1000" in err
    assert "--parallel fsdp does nothing in one process" in err and err.count("\n") == 2
    want |= {"ema_halflife_kimg": 250, "kimg": 1000, "student_scale": 10, "adversarial_weight": 0.1}
    assert {name: found[name] for name in want} == want and found["iterations"] == 3907
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["digits-sign", "--dmd", 0],  # its fake_updates and fake_lr are not read
        ["digits-sign", "--reg", 0],
        ["digits-sign", "--idem", 0],
        ["digits-sign", "--matching", "sid", "--alpha", 1],
        ["digits-sid", "--reg", 0],
        ["digits-sid", "--pairs", 9],
        ["cifar10-uncond", "--method", "sida", "--teacher", "digits-uncond", "--data", "digits"],
    ],
)
def test_values_of_a_recipe_that_are_not_read_are_no_fault(tmp_path, capfd, words):
    status, _, err = run(capfd, "distill", "--recipe", *words, "--outdir", tmp_path / "run", "--dry-run")
    assert status == 0, err


def launch(*words, processes=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}  # a crash says where
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), "-m", "sign_fast.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_two_processes_follow_one(tmp_path, capfd):
    teacher = write_teacher(tmp_path / "teacher")
    words = ["distill", "--method", "sign", "--teacher", teacher, *SHORT, "--pairs", 16, "--reg", 1, "--lr", 1e-4]
    assert run(capfd, *words, "--outdir", tmp_path / "one")[0] == 0
    done = launch(*words, "--outdir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        for name in set(one) - {"images_per_second"}:
            # what differs is float32's sums in another order, which Adam's first steps enlarge: 6e-6 measured
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    pairs = [load_file(tmp_path / name / "teacher_pairs.safetensors") for name in ("one", "two")]
    assert float((pairs[0]["y"] - pairs[1]["y"]).abs().max()) < 1e-4
    longer = [*words, "--outdir", tmp_path / "two", "--duration", 0.000048, "--parallel", "fsdp"]
    done = launch(*longer, processes=2)  # goes on in shards
    assert done.returncode == 0, done.stderr
    assert [int(row["iteration"]) for row in losses(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    assert run(capfd, *words, "--outdir", tmp_path / "one", "--duration", 0.000048)[0] == 0
    assert losses(tmp_path / "two")[-1]["rec"] == pytest.approx(losses(tmp_path / "one")[-1]["rec"], rel=1e-4)
    with (tmp_path / "two" / "quality.csv").open() as file:
        qualities = [float(row["quality_1"]) for row in csv.DictReader(file)]
    _, out, _ = run(capfd, "evaluate", "--network", tmp_path / "two" / "network", "--num", 20, "--json")
    assert json.loads(out)["Fréchet distance"] == pytest.approx(qualities[-1], rel=1e-3)


@pytest.mark.parametrize(
    ("command", "message"),
    [("distill", "in use by a running"), ("train", "in use by a running"), ("check", "samples-00000002.png")],
)
def test_an_error_of_the_first_of_two_processes_is_one_line(tmp_path, command, message):
    from sign_fast.checkpoints.lock import FolderLock

    words = ["train", "--data", "digits", "--preset", "digits-uncond", "--batch", 8, "--duration", 0.000008]
    if command != "train":
        words = ["distill", "--method", "sid", "--teacher", write_teacher(tmp_path / "teacher"), *SHORT]
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    if command == "check":  # the sample grid of the first quality check cannot be written
        (run_folder / "samples-00000002.png" / "in the way").mkdir(parents=True)
    with FolderLock(run_folder) if command != "check" else nullcontext():
        done = launch(*words, "--outdir", run_folder, processes=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("sign-fast: ")]
    assert len(told) == 1 and told[0].startswith("sign-fast: error (process 0): ") and message in told[0]
    assert "RuntimeError" not in done.stderr and "gloo" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a --method (sid, sida, sign or sid-latent), or a --recipe"),
        (["--method", "sid"], "name a --teacher"),
        (["--method", "sid", "--teacher", "nowhere"], "no network 'nowhere'"),
        (["--recipe", "digit-sid"], "did you mean 'digits-sid'"),
        (["--recipe", "digits-sign", "--method", "sid"], "is of sign: leave --method away"),
        (["--recipe", "digits-sign", "--steps", 4], "--steps goes with --method sid, not with sign"),
        (["--recipe", "digits-sid", "--rec", 1], "--rec goes with --method sign, not with sid"),
        (["--recipe", "digits-sid", "--lsg-gan", 1], "--lsg-gan goes with --method sida"),
        (["--recipe", "digits-sid", "--steps", 0], "steps must be at least 1"),
        (["--recipe", "digits-sid", "--alpha", "nan"], "alpha must be between"),
        (["--recipe", "digits-sign", "--update", "combined", "--matching", "sid"], "use --update alternating"),
        (["--method", "sida", "--teacher", "digits-uncond"], "name them with --data"),
        (["--method", "sida", "--teacher", "digits-uncond", "--data", "nowhere"], "no data set at nowhere"),
        (["--recipe", "digits-sid", "--device", "gpu"], "device 'gpu' is not a device"),
        (["--recipe", "digits-sid", "--precision", "fp8"], "'fp8' is not one of"),
        (["--recipe", "digits-sign", "--data", "NAN"], "image 1 holds NaN or Inf"),
        (["--recipe", "digits-sign", "--held-out", "NAN"], "image 1 holds NaN or Inf"),
        (["--recipe", "digits-sign", "--held-out", "nowhere.npz"], "no data set at nowhere.npz"),
        (["--recipe", "digits-sid", "--duration", "0.0000001"], "less than one image: raise --duration"),
        (["--recipe", "digits-sid", "--data", "digits"], "--data goes with --method sida, not with sid"),
        (["--recipe", "digits-sid", "--xflip"], "--xflip goes with --method sida, not with sid"),
        (["--recipe", "digits-sid", "--held-out", "digits"], "--held-out goes with --method sign, not with sid"),
        (["--recipe", "digits-sid", "--student-after", 1], "--student-after goes with --method sida, not with sid"),
        (["--recipe", "digits-sid", "--adversarial-after", 1], "--adversarial-after goes with --method sida"),
        (["--recipe", "digits-sid", "--reg", 0, "--pairs", 9], "--pairs goes with --reg above 0: leave it away"),
        (["--recipe", "digits-sign", "--alpha", 1], "--alpha goes with --matching sid: leave it away"),
        (["--recipe", "digits-sign", "--dmd", 0, "--fake-beta1", 0.9], "--fake-beta1 goes with --dmd above 0"),
        (["--recipe", "digits-sign", "--dmd", 0, "--matching", "sid"], "--matching goes with --dmd above 0"),
        (["--recipe", "digits-sign", "--idem", 0, "--idem-ramp", 1], "--idem-ramp goes with --idem above 0"),
        (["--method", "sign", "--teacher", "digits-uncond", "--xflip"], "--xflip goes with --data: leave it away"),
        (["--recipe", "digits-sid", "--update", "combined", "--tmin", 200, "--tmax", 400], "nearer to 0 and 1000"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capfd, words, message):
    images = np.zeros((4, 1, 8, 8), np.float32)
    images[1, 0, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", images=images)
    words = [str(tmp_path / "nan.npz") if word == "NAN" else word for word in words]
    status, _, err = run(capfd, "distill", *words, "--outdir", tmp_path / "run")
    assert status != 0 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_recipe_or_in_use(teacher, tmp_path, capfd):
    from sign_fast.checkpoints.lock import FolderLock

    words = ["distill", "--method", "sid", "--teacher", teacher, "--outdir", tmp_path, *SHORT]
    assert run(capfd, *words)[0] == 0
    status, _, err = run(capfd, *words, "--alpha", 1.0, "--lr", 1e-4)
    assert status == 1 and "holds a run with another lr, alpha" in err and err.count("\n") == 1
    with FolderLock(Path(tmp_path)):
        status, _, err = run(capfd, *words)
    assert status == 1 and f"in use by a running job (process {os.getpid()})" in err and err.count("\n") == 1

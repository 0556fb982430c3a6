"""A run: what it writes, exact resume after kill -9 at any moment, when it stops, what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sign_fast import ImageGenerator
from sign_fast.checkpoints.lock import FolderLock
from sign_fast.data import open_dataset
from sign_fast.distill import run_monitor
from sign_fast.distill.batches import Batches
from sign_fast.distill.monitor import loss_columns
from sign_fast.distill.pairs import FILE, make_pairs, pairs_at
from sign_fast.distill.run_settings import check_shares
from sign_fast.distill.settings import check_settings, remarks
from sign_fast.distill.trainer import Distiller
from sign_fast.errors import SignFastError
from sign_fast.models import load
from sign_fast.sampling import edm_sampler
from sign_fast.training.loop import Trainer, TrainSettings
from tests import tiny_runs
from tests.tiny_runs import CPU, MOMENTS, brightness, settings, write_teacher

ITERATIONS = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "network")


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(settings(teacher), folder)
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take longer than these runs; `finished`, made before this, has its own."""
    monkeypatch.setattr(run_monitor, "draw_curves", lambda *arguments, **options: "")


def run(s, folder, quality=brightness, report=lambda progress: None):
    distiller = Distiller(s, folder, CPU, quality=quality)
    distiller.run(report)
    return distiller


def rows(folder, table="metrics"):
    """Without the speed, which no two runs share."""
    with (folder / f"{table}.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def state(folder, iteration=ITERATIONS):
    return torch.load(folder / f"state-{iteration:08d}.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(a, b, iterations=ITERATIONS):
    """Weights, average, optimizers, guard, rows and both networks."""
    assert equal(state(a, iterations), state(b, iterations))
    assert rows(a) == rows(b) and rows(a, "quality") == rows(b, "quality")
    for name in ("network", "best"):
        assert equal(load_file(a / name / "model.safetensors"), load_file(b / name / "model.safetensors"))


# ---- what it writes ----


def test_a_run_writes_what_it_promises(finished):
    assert [row["iteration"] for row in rows(finished)] == [str(i) for i in range(1, ITERATIONS + 1)]
    assert [row["iteration"] for row in rows(finished, "quality")] == ["2", "4", "6", "8"]
    assert sorted(p.name for p in finished.glob("state-*")) == ["state-00000006.pt", "state-00000008.pt"]
    assert len(list(finished.glob("samples-*.png"))) == 4
    assert (finished / "curves.png").stat().st_size > 1000
    assert any((finished / "tensorboard").iterdir())
    assert json.loads((finished / "settings.json").read_text())["seed"] == 5
    assert all(math.isfinite(float(value)) for row in rows(finished) for value in row.values())


def test_the_best_student_is_the_one_of_the_best_quality(finished):
    qualities = {int(row["iteration"]): float(row["quality_1"]) for row in rows(finished, "quality")}
    best = json.loads((finished / "best" / "config.json").read_text())
    assert best["trained"]["iterations"] == min(qualities, key=qualities.get)
    assert best["quality"]["Fréchet distance"] == pytest.approx(min(qualities.values()), rel=1e-4)
    assert "Fréchet distance" in (finished / "best" / "README.md").read_text()
    last = json.loads((finished / "network" / "config.json").read_text())
    assert last["trained"]["iterations"] == ITERATIONS and last["role"] == "student"


def test_the_logged_quality_is_of_the_saved_student(finished):
    images = ImageGenerator.from_pretrained(finished / "network", "cpu")(range(16)).permute(0, 3, 1, 2)
    assert float(rows(finished, "quality")[-1]["quality_1"]) == pytest.approx(brightness(images), rel=1e-5)


def best_figures(folder):
    """What config.json of best/ says of its quality, and the row of quality.csv that it is of."""
    config = json.loads((folder / "best" / "config.json").read_text())
    (row,) = (r for r in rows(folder, "quality") if r["iteration"] == str(config["trained"]["iterations"]))
    return config["quality"], row


def test_a_few_step_student_is_sampled_as_it_was_trained(teacher, tmp_path):
    run(settings(teacher, steps=4, sigma_init=3.0, kimg=0.016), tmp_path)
    assert [key for key in rows(tmp_path, "quality")[0] if key.startswith("quality")] == [
        "quality_1",
        "quality_2",
        "quality_4",
    ]
    generator = ImageGenerator.from_pretrained(tmp_path / "network", "cpu")
    plain = ImageGenerator(load(tmp_path / "network", "cpu"))
    assert torch.equal(generator(range(4)), plain(range(4), 4, sigma=3.0))
    assert not torch.equal(generator(range(4)), plain(range(4), 4))
    assert torch.equal(generator(range(4), 2), plain(range(4), 2, sigma=3.0))
    assert torch.equal(generator(range(4), sampler="one_step"), plain(range(4), 1, sigma=3.0))
    found, row = best_figures(tmp_path)
    assert (found["steps"], found["Fréchet distance"]) == (4, round(float(row["quality_4"]), 3))
    for k in (1, 2):
        assert found[f"Fréchet distance, steps {k}"] == pytest.approx(float(row[f"quality_{k}"]), abs=6e-4)


@pytest.mark.parametrize("update", ["alternating", "combined"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sid"},
        {"method": "sid", "reg": 1},
        {"method": "sida", "data": "digits:train", "student_kimg": 0.008, "adversarial_kimg": 0.016},
        {"method": "sign", "reg": 0.5, "rec": 0.5},
        {"method": "sign", "data": "digits:train", "rec": 0, "flow": 0, "fake_updates": 2},
        {"method": "sign", "matching": "sid"},
        {"method": "sign", "dmd": 0, "den": 0},
    ],
    ids=str,
)
def test_every_loss_has_its_column(teacher, update, changes):
    s = settings(teacher, update=update, pairs=8, **changes)
    if update == "combined" and s.matching == "sid":
        pytest.skip("refused")
    distiller = Distiller(s, None, CPU)
    seen = {name for _ in range(3) for name in distiller.step()}
    distiller.close()
    assert seen == set(loss_columns(s))


def test_sign_logs_idempotence_and_reconstruction(teacher, tmp_path):
    run(settings(teacher, method="sign", kimg=0.016), tmp_path)
    row = rows(tmp_path, "quality")[-1]
    assert {"quality_1", "quality_2", "idempotence_noise", "reconstruction", "score_gap_0.1"} < row.keys()
    student, held_out = load(tmp_path / "network", "cpu"), tiny_held_out()
    labels = torch.eye(10)[held_out[1]]
    with torch.no_grad():
        wrong = (student(held_out[0], labels) - held_out[0]).square().mean().sqrt()
    assert float(row["reconstruction"]) == pytest.approx(float(wrong), rel=1e-4)
    found, row = best_figures(tmp_path)
    assert (found["steps"], found["sampler"]) == (1, "recursive")
    for name, column in {
        "Fréchet distance": "quality_1",
        "Fréchet distance, steps 2": "quality_2",
        "idempotence, noise, RMS": "idempotence_noise",
        "idempotence, data, RMS": "idempotence_data",
        "reconstruction, RMS": "reconstruction",
    }.items():
        assert found[name] == pytest.approx(float(row[column]), abs=6e-5 if "RMS" in name else 6e-4)
        assert f"- {name}: {found[name]}" in (tmp_path / "best" / "README.md").read_text()


@pytest.mark.parametrize(
    ("label_dim", "data", "measured", "trained_on"),
    [
        (0, "digits:train", "digits:test", False),
        (10, None, "digits:test", False),
        (0, "digits", "digits", True),
        (0, "digits_mine.npz", "digits_mine.npz", True),
        (5, None, None, False),  # no teacher of digits
    ],
)
def test_reconstruction_is_of_images_that_are_held_out_or_says_not(tmp_path, label_dim, data, measured, trained_on):
    teacher = write_teacher(tmp_path / "teacher", label_dim=label_dim)
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "digits_mine.npz", images=images)

    def place(name):
        return str(tmp_path / name) if name and name.endswith("npz") else name

    distiller = Distiller(settings(teacher, method="sign", data=place(data)), None, CPU)
    said = [note for note in distiller.notes if "reconstruction is measured on what the student is trained on" in note]
    assert len(said) == (trained_on or measured is None)
    if measured is None:
        assert distiller._held_out is None and "the teacher's samples" in said[0]
        return
    source, found = open_dataset(place(measured)), distiller._held_out
    every = np.linspace(0, len(source) - 1, min(len(source), 500)).round()
    want = np.stack([source.image(int(i)) for i in every])
    np.testing.assert_array_equal(found.images.numpy(), want.astype(np.float32) / 127.5 - 1)
    assert found.trained_on == trained_on
    classes = None if found.labels is None else found.labels.argmax(1).tolist()
    assert classes == (None if not label_dim else [source.label(int(i)) for i in every])


def test_held_out_images_that_do_not_fit_are_refused_before_anything_is_written(teacher, tmp_path):
    labels = np.arange(12) % 10
    hurt = np.zeros((12, 1, 8, 8), np.float32)
    hurt[3] = np.nan
    for name, images, classes, message in [
        ("size", np.zeros((12, 1, 16, 16), np.uint8), labels, r"\(1, 16, 16\) \(C, H, W\), the teacher"),
        ("channels", np.zeros((12, 3, 8, 8), np.uint8), labels, r"\(3, 8, 8\) \(C, H, W\)"),
        ("unlabelled", np.zeros((12, 1, 8, 8), np.uint8), None, "has no labels, the teacher .* 10 classes"),
        ("classes", np.zeros((12, 1, 8, 8), np.uint8), labels + 1, "has 11 classes, the teacher .* 10 classes"),
        ("nan", hurt, labels, "image 3 holds NaN or Inf"),
        ("missing", None, None, "no file"),
    ]:
        path = tmp_path / f"{name}.npz"
        if images is not None:
            np.savez(path, images=images, **({} if classes is None else {"labels": classes}))
        s = settings(teacher, method="sign", held_out=str(path))
        with pytest.raises(SignFastError, match=message):
            Distiller(s, tmp_path / "run", CPU)
        assert not (tmp_path / "run").exists()
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "b.png").write_bytes(b"no picture")
    unconditional = write_teacher(tmp_path / "teacher", label_dim=0)
    with pytest.raises(SignFastError, match=r"b\.png is not a readable image"):
        Distiller(settings(unconditional, method="sign", held_out=str(tmp_path / "pictures")), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def tiny_held_out():
    data = open_dataset("digits:test")
    images = torch.from_numpy(np.stack([data.image(i) for i in range(len(data))])).float() / 127.5 - 1
    return images, torch.tensor([data.label(i) for i in range(len(data))])


def test_what_is_off_for_want_of_a_package_is_told(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(run_monitor, "draw_curves", lambda *arguments, **options: "curves.png is off: install it")
    assert run(settings(teacher, kimg=0.008), tmp_path).notes == ["curves.png is off: install it"]


def test_without_features_there_is_no_quality_but_a_note(tmp_path):
    teacher = write_teacher(tmp_path / "teacher", img_channels=3, img_resolution=16, label_dim=0)
    done = run(settings(teacher, kimg=0.016), tmp_path / "run", quality=None)
    assert any("no quality is logged" in note for note in done.notes)
    assert not (tmp_path / "run" / "best").exists() and (tmp_path / "run" / "network").exists()
    assert "score_gap_1" in rows(tmp_path / "run", "quality")[0]


# ---- resuming ----


@pytest.fixture(scope="module")
def killed(teacher, tmp_path_factory):
    """Folders of runs that kill -9 has ended, by the moment."""
    folder = tmp_path_factory.mktemp("killed")
    root = Path(tiny_runs.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    words = [sys.executable, tiny_runs.__file__, teacher, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ended = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert ended == {moment: "-9" for moment in MOMENTS}, done.stderr
    return folder


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_kill_dash_nine_and_again(teacher, finished, killed, moment):
    folder = killed / moment
    best = (folder / "best").exists() or (folder / ".best.old").exists()
    again = Distiller(settings(teacher), folder, CPU, quality=brightness)
    assert again.iteration in (3, 6)
    assert best == (folder / "best").exists()  # nothing that was complete is lost
    again.run()
    assert_same_run(folder, finished)
    assert not list(folder.glob(".*.tmp")) and not [p for p in folder.glob(".*") if p.is_dir()]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sign", "reg": 1, "fake_updates": 2},
        {"method": "sign", "data": "digits:train", "xflip": True, "update": "combined", "lr_schedule": "cosine"},
        {"method": "sida", "data": "digits:train", "student_kimg": 0.016, "adversarial_kimg": 0.04},
        {"steps": 3, "update": "combined", "accumulation": 2},
    ],
    ids=str,
)
def test_resume_is_exact(teacher, tmp_path, changes):
    s = settings(teacher, kimg=0.048, **changes)

    def stop(progress):
        if progress.iteration == 5:
            raise Stopped

    run(s, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(s, tmp_path / "cut", report=stop)
    pairs = tmp_path / "cut" / FILE
    written = pairs.stat().st_mtime_ns if pairs.exists() else None
    again = Distiller(s, tmp_path / "cut", CPU, quality=brightness)
    assert again.iteration == 3
    again.run()
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 6)
    assert written is None or pairs.stat().st_mtime_ns == written  # read, not made again


def test_a_finished_run_stays_as_it_is(teacher, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    run(settings(teacher), tmp_path / "copy")
    assert_same_run(tmp_path / "copy", finished)


def test_a_longer_run_goes_on(teacher, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    run(settings(teacher, kimg=0.08, log_every=2, keep=3), tmp_path / "copy")
    run(settings(teacher, kimg=0.08), tmp_path / "whole")
    assert equal(state(tmp_path / "copy", 10)["updates"], state(tmp_path / "whole", 10)["updates"])


def test_a_damaged_newest_state_falls_back(teacher, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    newest = folder / "state-00000008.pt"
    newest.write_bytes(newest.read_bytes()[:3000])
    with pytest.warns(UserWarning, match=r"state-00000008.pt is damaged"):
        again = Distiller(settings(teacher), folder, CPU, quality=brightness)
    assert again.iteration == 6
    again.run()
    assert_same_run(folder, finished)


def test_a_run_whose_states_are_all_damaged_is_left_as_it_is(teacher, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for path in folder.glob("state-*"):
        path.write_bytes(path.read_bytes()[:3000])
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    with pytest.raises(SignFastError, match=r"holds 2 saved state\(s\), all damaged .*choose another --outdir"):
        Distiller(settings(teacher), folder, CPU)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "another lr: repeat its settings"),
        ({"method": "sign", "batch": 16}, "another method, batch: repeat"),
        ({"kimg": 0.08, "lr_schedule": "cosine"}, "another kimg, lr_schedule"),
        ({"seed": 6}, "another seed"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(teacher, finished, changes, message):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(SignFastError, match=message):
        Distiller(settings(teacher, **changes), finished, CPU)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    FolderLock(finished).release()  # a refused run does not hold it


def test_another_teacher_is_refused_and_the_same_elsewhere_is_not(teacher, finished, tmp_path):
    other = write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(SignFastError, match="from another teacher than"):
        Distiller(settings(other), finished, CPU)
    shutil.copytree(teacher, tmp_path / "moved")
    Distiller(settings(str(tmp_path / "moved")), finished, CPU).close()


def test_folders_of_something_else_are_refused(teacher, tmp_path):
    kwargs = json.loads((Path(teacher) / "config.json").read_text())["kwargs"]
    Trainer(TrainSettings("digits", "EDMPrecond", kwargs, batch=8, kimg=0.008), tmp_path / "teacher", CPU).run()
    with pytest.raises(SignFastError, match="a run that is not a distillation"):
        Distiller(settings(teacher), tmp_path / "teacher", CPU)
    for path in (tmp_path / "teacher").glob("state-*"):
        path.unlink()
    with pytest.raises(SignFastError, match="a network that is not of a distillation"):
        Distiller(settings(teacher), tmp_path / "teacher", CPU)


def test_a_folder_in_use_is_refused(teacher, tmp_path):
    first = Distiller(settings(teacher), tmp_path, CPU)
    with pytest.raises(SignFastError, match=rf"in use by a running job \(process {os.getpid()}\)"):
        Distiller(settings(teacher), tmp_path, CPU)
    kwargs = json.loads((Path(teacher) / "config.json").read_text())["kwargs"]
    with pytest.raises(SignFastError, match="in use by a running job"):
        Trainer(TrainSettings("digits", "EDMPrecond", kwargs, batch=8, kimg=0.008), tmp_path, CPU)
    first.close()
    Distiller(settings(teacher), tmp_path, CPU).close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": math.nan}, "alpha must be between -2 and 2, not nan"),
        ({"alpha": 20}, "alpha must be between"),
        ({"lr": math.inf}, "lr must be a number above 0"),
        ({"student_scale": 0}, "student_scale must be a number above 0"),
        ({"method": "sign", "rec": -1}, "rec must be a number at least 0"),
        ({"method": "sign", "dmd": math.nan}, "dmd must be a number at least 0"),
        ({"method": "sign", "steps": 4}, "leave --steps away"),
        ({"method": "sign", "matching": "sid", "update": "combined"}, "use --update alternating"),
        ({"method": "sign", "rec": 0, "idem": 0, "flow": 0, "dmd": 0}, "nothing to train"),
        ({"method": "sida"}, "sida trains with real images: name them with --data"),
        ({"method": "cid"}, "method must be sid or sida or sign"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"tmin": 900}, "tmin < tmax"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"betas": (0.0, 1.0)}, "betas must be two numbers"),
        ({"stop_factor": 1}, "stop_factor must be above 1"),
        ({"kimg": math.nan}, "kimg must be a number above 0"),
        ({"kimg": 0.0001}, "a duration of 0.0001 thousand images is less than one image: raise --duration"),
        (
            {"method": "sida", "data": "digits", "student_kimg": 0.064},
            "the run ends at 0.064 kimg, before the student .* at 0.064: raise --duration, or lower --student-after",
        ),
        ({"update": "combined", "tmin": 200, "tmax": 400}, r"leave out 3\d\.\d% .* bring --tmin and --tmax nearer"),
        ({"method": "sign", "update": "combined", "P_mean": -3.0}, r"leave out 2\d\.\d% .*: use --update alternating"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(SignFastError, match=message):
        check_settings(settings("digits-cond", **changes))


def test_a_run_without_a_use_for_levels_or_with_few_left_out_goes_on():
    check_settings(settings("T", update="combined", P_mean=-0.6, P_std=1.4))
    check_settings(settings("T", update="alternating", tmin=200, tmax=400))
    check_settings(settings("T", method="sign", update="combined", P_mean=-3.0, dmd=0))
    check_settings(settings("T", method="sida", data="digits", student_kimg=0.056))  # moves in the last iteration


def test_remarks():
    assert remarks(settings("T"), 1) == []
    sida = settings("T", method="sida", data="D", student_kimg=0, adversarial_kimg=0.064)
    (line,) = remarks(sida, 1)
    assert "the adversarial loss never sets in: it would at 0.064 kimg, the run ends at 0.064" in line
    assert remarks(replace(sida, adversarial_kimg=0.056), 1) == []
    assert remarks(settings("T", parallel="fsdp"), 2) == []
    (line,) = remarks(settings("T", parallel="fsdp"), 1)
    assert line.startswith("--parallel fsdp does nothing in one process")


def test_without_a_matching_term_there_is_no_fake_score(teacher, tmp_path):
    done = run(settings(teacher, method="sign", dmd=0, fake_updates=2, kimg=0.016), tmp_path)
    assert equal(done.networks.fake.state_dict(), done.networks.teacher.state_dict())
    assert not {"loss_fake", "grad_norm_fake"} & rows(tmp_path)[0].keys()
    assert not any(name.startswith("score_gap") for name in rows(tmp_path, "quality")[0])
    run(settings(teacher, method="sign", dmd=0, fake_updates=2), tmp_path)  # goes on from its state


def test_data_that_does_not_fit(teacher, tmp_path):
    def data(name, shape, labels=None):
        np.savez(tmp_path / name, images=np.zeros((12, *shape), np.uint8), **({} if labels is None else labels))
        return {"method": "sida", "data": str(tmp_path / name), "student_kimg": 0}

    five = {"labels": np.arange(12) % 5}
    for name, shape, labels, message in [
        ("size.npz", (1, 16, 16), five, r"\(1, 16, 16\) \(C, H, W\), the teacher"),
        ("channels.npz", (3, 8, 8), five, r"\(3, 8, 8\) \(C, H, W\)"),
        ("classes.npz", (1, 8, 8), five, "has 5 classes, the teacher .* 10 classes"),
        ("nolabels.npz", (1, 8, 8), None, "has no labels"),
    ]:
        with pytest.raises(SignFastError, match=message):
            Distiller(settings(teacher, **data(name, shape, labels)), tmp_path / "run", CPU)
        assert not (tmp_path / "run").exists()
    with pytest.raises(SignFastError, match=r"a batch of 8 does not divide into 1 processes × 3 parts"):
        Distiller(settings(teacher, accumulation=3), tmp_path / "run", CPU)
    with pytest.raises(SignFastError, match=r"a batch of 9 does not divide into 2 processes"):
        check_shares(settings(teacher, batch=9), 2)


def test_a_student_is_no_teacher(finished, teacher, tmp_path):
    with pytest.raises(SignFastError, match="is a student: name the denoiser"):
        Distiller(settings(str(finished / "network")), tmp_path / "a", CPU)
    run(settings(teacher, method="sign", kimg=0.008), tmp_path / "sign")
    with pytest.raises(SignFastError, match="is a time-free student"):
        Distiller(settings(str(tmp_path / "sign" / "network")), tmp_path / "b", CPU)


def test_an_unreadable_image_stops_the_run_and_the_state_stays(tmp_path):
    teacher = write_teacher(tmp_path / "teacher", label_dim=0)
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(32):
        Image.fromarray(np.full((8, 8), 8 * i, np.uint8)).save(folder / f"{i:02d}.png")
    s = settings(teacher, method="sign", data=str(folder), save_every=1, held_out="digits:test")
    done = run(replace(s, kimg=0.024), tmp_path / "run")
    loaded = {int(i) for i in np.random.default_rng([s.seed, 0]).permutation(32)[24:]}
    (folder / f"{max(loaded):02d}.png").write_bytes(b"no image")
    with pytest.raises(SignFastError, match=f"{max(loaded):02d}.png is not a readable image .* mend or remove it"):
        run(s, tmp_path / "run")
    assert done.iteration == 3 and (tmp_path / "run" / "state-00000003.pt").exists()


# ---- when it stops ----


def test_weights_that_are_not_finite_stop_the_run(teacher, tmp_path):
    s = settings(teacher, lr_rampup_kimg=0.04, lr=1e38, save_every=1, quality_every=1)
    with pytest.raises(SignFastError, match=r"not finite at iteration \d.*lower the learning rate.*keeps the best"):
        run(s, tmp_path)
    kept = sorted(tmp_path.glob("state-*.pt"))
    assert kept
    for path in kept:
        updates = torch.load(path, weights_only=True)["updates"]
        networks = updates["fake"]["net"], updates["student"]["net"], updates["ema"]
        assert all(torch.isfinite(t).all() for net in networks for t in net.values())
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "best" / "model.safetensors").values())


def test_a_teacher_that_is_not_finite_is_refused_at_the_start(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(SignFastError, match=r"the teacher .*bad has weights that are not finite: it is damaged"):
        Distiller(settings(str(tmp_path / "bad")), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_no_state_is_spoken_of_before_there_is_one(teacher, tmp_path):
    with pytest.raises(SignFastError, match=r"lower the learning rate, or use fp32$"):
        run(settings(teacher, lr=1e38, save_every=8, quality_every=8), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(teacher, tmp_path):
    s = settings(teacher)
    distiller = Distiller(s, tmp_path, CPU, quality=brightness)
    step = distiller.updates.run

    def poisoned(number, *batch):
        return step(number, *batch) | ({"loss_fake": torch.tensor(math.nan)} if number == 4 else {})

    distiller.updates.run = poisoned
    with pytest.raises(SignFastError, match=r"weights or losses are not finite at iteration 5.*keeps the best student"):
        distiller.run()
    assert Distiller(s, tmp_path, CPU).iteration == 3


def test_a_diverging_run_stops_with_its_best_kept(teacher, tmp_path):
    s = settings(teacher, kimg=0.16, stop_factor=2)
    figures = dict(zip(count(2, 2), [9.0, 5.0, 30.0, 8.0, 20.0, 30.0, 40.0, 1.0], strict=False))

    def scripted(images):
        return figures[2 * next(checks)]

    checks = count(1)
    with pytest.raises(SignFastError, match=r"quality 40 at iteration 14, for 3 checks worse than 2 × its best.*5 at"):
        run(s, tmp_path, scripted)
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    assert config["trained"]["iterations"] == 4 and config["quality"]["Fréchet distance"] == 5.0
    assert [row["quality_1"] for row in rows(tmp_path, "quality")][-1] == "40"
    checks = count(7)  # a state of iteration 12 was kept, with what the guard knew
    with pytest.raises(SignFastError, match="at iteration 14, for 3 checks"):
        run(s, tmp_path, scripted)


# ---- the teacher's samples ----


def test_pairs_are_the_teachers_ode(teacher):
    net = load(teacher, "cpu")
    z, y, labels = make_pairs(net, 6, seed=3)
    want = edm_sampler(net, z, labels, num_steps=18)
    assert torch.allclose(y.double(), want, atol=1e-4 * float(want.abs().max()))
    assert labels.shape == (6, 10) and torch.equal(labels.sum(1), torch.ones(6))
    more = make_pairs(net, 9, seed=3)
    assert torch.equal(more[0][:6], z) and torch.equal(more[2][:6], labels)
    assert not torch.equal(make_pairs(net, 6, seed=4)[0], z)


def test_pairs_of_later_calls_begin_at_the_sample_before(teacher):
    net, levels = load(teacher, "cpu"), [1.5, 0.4]
    z, y, labels = make_pairs(net, 6, seed=3, levels=levels)
    first, sample, _ = make_pairs(net, 6, seed=3)
    assert z.shape == y.shape == (6, 3, *first.shape[1:])
    torch.testing.assert_close(z[:, 0], first)
    torch.testing.assert_close(y[:, 0], sample)
    noise = [z[:, k] - sample / sigma for k, sigma in enumerate(levels, 1)]
    for k, sigma in enumerate(levels, 1):
        assert 0.8 < float(noise[k - 1].std()) < 1.2
        want = edm_sampler(net, z[:, k], labels, num_steps=18, sigma_max=sigma)
        assert torch.allclose(y[:, k].double(), want, atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(*noise)


def test_pairs_of_a_damaged_teacher_are_refused(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    name = next(name for name in weights if name.endswith("conv0.weight"))
    weights[name] = torch.full_like(weights[name], math.nan)
    save_file(weights, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(SignFastError, match="the teacher's samples are not finite"):
        make_pairs(load(tmp_path / "bad", "cpu"), 4, seed=0)


def test_a_damaged_file_of_pairs_is_made_again(teacher, tmp_path):
    s = settings(teacher, method="sign", kimg=0.024)
    run(s, tmp_path)
    whole, weights = (tmp_path / FILE).read_bytes(), load_file(tmp_path / "network" / "model.safetensors")
    for path in [*tmp_path.glob("state-*")]:
        path.unlink()
    (tmp_path / FILE).write_bytes(whole[:1000])
    with pytest.warns(UserWarning, match=f"{FILE} is damaged"):
        run(s, tmp_path)
    assert (tmp_path / FILE).read_bytes() == whole
    assert equal(load_file(tmp_path / "network" / "model.safetensors"), weights)
    for path in [*tmp_path.glob("state-*"), tmp_path / "settings.json"]:
        path.unlink()
    shutil.rmtree(tmp_path / "network")
    shutil.rmtree(tmp_path / "best")
    run(replace(s, pairs=30), tmp_path)  # others than those asked for
    assert len(load_file(tmp_path / FILE)["z"]) == 30


def test_shares_of_processes_are_the_whole_and_every_pair_is_seen():
    pairs = (torch.arange(24.0).reshape(24, 1, 1, 1), -torch.arange(24.0).reshape(24, 1, 1, 1), torch.eye(24))
    whole = pairs_at(pairs, 5, 8, 0, slice(0, 8))
    parts = [pairs_at(pairs, 5, 8, 0, slice(4 * r, 4 * r + 4)) for r in range(2)]
    assert all(torch.equal(torch.cat([p[i] for p in parts]), whole[i]) for i in range(3))
    assert torch.equal(whole[0], -whole[1]) and torch.equal(whole[2].argmax(1).float(), whole[0].flatten())
    epoch = torch.cat([pairs_at(pairs, i, 8, 0, slice(0, 8))[0] for i in range(3)])
    assert sorted(epoch.flatten().tolist()) == list(range(24))


def test_batches_come_in_any_order(teacher):
    s = settings(teacher, method="sign", reg=1)
    pairs = make_pairs(load(teacher, "cpu"), 24, seed=0)
    batches = Batches(s, None, pairs, 10, CPU)
    images, labels, (z, y, classes) = batches.at(3)
    assert equal(batches.at(0)[0], Batches(s, None, pairs, 10, CPU).at(0)[0])
    assert equal(list(batches.at(3)), [images, labels, (z, y, classes)])
    assert not torch.equal(images, y)  # two orders
    for image, label in zip(images, labels, strict=True):
        number = next(i for i in range(24) if torch.equal(pairs[1][i], image))
        assert torch.equal(pairs[2][number], label)

"""`sign-fast edit` as a user runs it: files, table, and everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sign_fast import models
from sign_fast.checkpoints.store import find, read_config, save_network
from sign_fast.cli.origin import note_of
from sign_fast.data import open_dataset
from sign_fast.editing import PatchMeans, project
from sign_fast.sampling.engine import Engine
from sign_fast.sampling.pictures import read_png, save_png
from tests.cli.test_generate import run
from tests.network_cases import NETWORKS, network


def save_student(folder, teacher, kwargs):
    student = models.IdempotentPrecond.from_teacher(teacher, sigma=1.0)
    save_network(folder, student.state_dict(), "IdempotentPrecond", {**kwargs, "sigma": 1.0}, role="student")
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Folders of students: grey digits, digits with classes, 16×16 in colour."""
    folder = tmp_path_factory.mktemp("students")
    for name in ("digits-uncond", "digits-cond"):
        save_student(folder / name, models.load(name, "cpu"), read_config(find(name))["kwargs"])
    save_student(folder / "colour", network("ddpmpp"), NETWORKS["ddpmpp"][1])
    return folder


def edit(capfd, student, task, images, *words):
    return run(
        capfd, "edit", "--network", student, "--task", task, "--images", images, "--device", "cpu", *words
    )  # fmt: skip


def write_images(folder, count=3, size=8, mode="L", seed=0, labels=None):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size) if mode == "L" else (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{i}.png")
    if labels is not None:
        entries = [[f"picture{i}.png", label] for i, label in enumerate(labels)]
        (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def pixels(folder):
    return {str(p.relative_to(folder)): read_png(p) for p in sorted(folder.rglob("*.png"))}


def write_mask(path, size=8):
    mask = np.zeros((size, size), np.uint8)
    mask[: size // 2] = 255
    Image.fromarray(mask).save(path)
    return path


def test_inpaint_keeps_names_and_known_pixels(tmp_path, capfd, students):
    images = write_images(tmp_path / "in")
    mask = write_mask(tmp_path / "mask.png")
    words = ("--mask", mask, "--outdir", tmp_path / "out", "--grid", tmp_path / "grid.png")
    status, out, _ = edit(capfd, students / "digits-uncond", "inpaint", images, *words)
    assert status == 0 and "3 images in" in out and "before and after in" in out
    before, after = pixels(images), pixels(tmp_path / "out")
    assert list(after) == ["picture0.png", "picture1.png", "picture2.png"]
    for name in before:
        assert np.array_equal(after[name][4:], before[name][4:])
        assert not np.array_equal(after[name][:4], before[name][:4])
    grid = read_png(tmp_path / "grid.png")
    assert grid.shape[0] > grid.shape[1]  # three rows of before and after


def test_is_the_function_whatever_the_batch(tmp_path, capfd, students):
    words = ("--num", 5, "--seeds", "7-10,900", "--noise-level", 0.4, "--rounds", 1)
    for folder, batch in (("a", 5), ("b", 2)):
        more = ("--outdir", tmp_path / folder, "--batch", batch, *words)
        assert edit(capfd, students / "digits-uncond", "sketch", "digits:test", *more)[0] == 0
    data = open_dataset("digits:test")
    given = torch.from_numpy(np.stack([data.image(i) for i in range(5)])).float() / 127.5 - 1
    net = models.load(students / "digits-uncond", "cpu")
    want = project(net, given, noise_level=0.4, rounds=1, seeds=[7, 8, 9, 10, 900], output="uint8")
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert list(a) == list(b) == [f"{i:06d}.png" for i in range(5)]
    for i, name in enumerate(a):
        assert np.array_equal(a[name], want[i].numpy())
        assert np.abs(a[name].astype(int) - b[name]).max() <= 1


def test_super_resolve_small_and_whole_images(tmp_path, capfd, students):
    rng = np.random.default_rng(0)
    means = rng.integers(0, 64, (2, 4, 4), dtype=np.uint8) * 4
    for name, zoom in (("small", 1), ("whole", 2)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(means[i].repeat(zoom, 0).repeat(zoom, 1)).save(tmp_path / name / f"{i}.png")
        words = ("--outdir", tmp_path / f"{name}-out", "--factor", 2)
        assert edit(capfd, students / "digits-uncond", "super-resolve", tmp_path / name, *words)[0] == 0
    small, whole = pixels(tmp_path / "small-out"), pixels(tmp_path / "whole-out")
    for i, name in enumerate(small):
        assert np.array_equal(small[name], whole[name]) and small[name].shape == (8, 8, 1)
        patches = torch.from_numpy(small[name].astype(np.float64)).permute(2, 0, 1)[None]
        kept = PatchMeans(2).corrupt(patches)[0, 0, ::2, ::2].numpy()
        assert np.abs(kept - means[i]).max() <= 0.51


def test_colorize_grey_images(tmp_path, capfd, students):
    images = write_images(tmp_path / "in", size=16)
    assert edit(capfd, students / "colour", "colorize", images, "--outdir", tmp_path / "out")[0] == 0
    grey = pixels(images)
    for name, image in pixels(tmp_path / "out").items():
        assert image.shape == (16, 16, 3) and image.std(2).mean() > 1
        assert np.abs(image @ [0.299, 0.587, 0.114] - grey[name][:, :, 0]).max() <= 0.51


def test_evaluate_takes_a_batch_at_a_time(monkeypatch, capfd, students):
    sizes, whole = [], Engine.edit
    monkeypatch.setattr(Engine, "edit", lambda self, plan, images, *rest: (
        sizes.append(len(images)) or whole(self, plan, images, *rest)))  # fmt: skip
    words = ("--evaluate", "--num", 5, "--batch", 2)
    assert edit(capfd, students / "digits-uncond", "denoise", "digits:test", *words)[0] == 0
    assert sizes == [2, 2, 1]


def test_evaluate_table_and_json(tmp_path, capfd, students):
    words = ("--evaluate", "--teacher", "digits-uncond", "--teacher-noise-level", 0.8, "--num", 20)
    words += ("--rounds", 2, "--noise-level", 0.5)
    more = ("--grid", tmp_path / "g" / "grid.png", "--outdir", tmp_path / "out")
    status, table, _ = edit(capfd, students / "digits-uncond", "inpaint", "digits:test", *words, *more)
    assert status == 0 and len(pixels(tmp_path / "out")) == 20 and (tmp_path / "g" / "grid.png").is_file()
    lines = table.splitlines()
    assert lines[0] == "inpaint: 20 images of digits:test, 2 rounds"
    assert lines[-1].startswith("truth | corrupted | student | teacher, Euler | teacher, Heun in ")
    status, out, _ = edit(capfd, students / "digits-uncond", "inpaint", "digits:test", *words, "--json")
    facts = json.loads(out)
    assert {k: v for k, v in facts.items() if k != "scores"} == {
        "task": "inpaint",
        "images": 20,
        "source": "digits:test",
        "rounds": 2,
    }
    assert [score["noise_level"] for score in facts["scores"]] == [0.5, None, 0.8, 0.8]
    for line, score in zip(lines[2:6], facts["scores"], strict=True):
        method, rest = line[:16].strip(), line[16:].split()
        assert method == score["method"] and int(rest[0]) == score["calls"]
        assert rest[1] == ("–" if score["noise_level"] is None else str(score["noise_level"]))
        assert float(rest[2]) == pytest.approx(score["psnr"], abs=0.006)
        assert float(rest[3]) == pytest.approx(score["standard_error"], abs=0.006)


def test_one_image_has_no_error(capfd, students):
    words = ("--evaluate", "--num", 1)
    assert " –" in edit(capfd, students / "digits-uncond", "denoise", "digits:test", *words)[1]
    facts = json.loads(edit(capfd, students / "digits-uncond", "denoise", "digits:test", *words, "--json")[1])
    assert facts["scores"][0]["standard_error"] is None


def test_classes_come_from_the_data_or_the_option(tmp_path, capfd, students):
    student = students / "digits-cond"
    labelled = write_images(tmp_path / "labelled", labels=[3, 3, 5])
    plain = write_images(tmp_path / "plain")
    assert edit(capfd, student, "project", labelled, "--outdir", tmp_path / "a")[0] == 0
    assert edit(capfd, student, "project", plain, "--class", 3, "--outdir", tmp_path / "b")[0] == 0
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert [np.array_equal(a[name], b[name]) for name in a] == [True, True, False]
    status, _, err = edit(capfd, student, "project", plain, "--outdir", tmp_path / "c")
    assert status == 1 and "this network has classes 0 to 9" in err and "add --class" in err
    wrong = write_images(tmp_path / "wrong", labels=[0, 1, 10])
    status, _, err = edit(capfd, student, "project", wrong, "--outdir", tmp_path / "c")
    assert status == 1 and "class label 10 is out of range" in err
    assert not (tmp_path / "c").exists()


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(tmp_path, capfd, students):
    grey, colour = students / "digits-uncond", students / "colour"
    good = write_images(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    rgb = write_images(tmp_path / "rgb", mode="RGB")
    large = write_images(tmp_path / "large", size=16)
    broken = write_images(tmp_path / "broken")
    (broken / "picture2.png").write_bytes((broken / "picture2.png").read_bytes()[:60])
    mixed = write_images(tmp_path / "mixed")
    Image.new("L", (6, 6)).save(mixed / "picture9.png")
    twice = write_images(tmp_path / "twice")
    Image.new("L", (8, 8)).save(twice / "picture0.bmp")
    write_mask(tmp_path / "other.png", size=6)
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    write_mask(tmp_path / "mask.png")
    cases = [
        (grey, "denoise", tmp_path / "nowhere", [], "no data set at"),
        (grey, "denoise", tmp_path / "empty", [], "holds no image"),
        (grey, "denoise", "digits:valid", [], "the digits are digits, digits:train, digits:test"),
        (grey, "denoise", rgb, [], "the images are RGB, the network's grey: convert them"),
        (grey, "denoise", large, [], "the images are 16×16, the network's 8×8: resize them"),
        (grey, "super-resolve", large, [], "the images are 16×16, the network's 4×4 or 8×8"),
        (grey, "super-resolve", good, ["--factor", 3], "8×8 pixels have no patches of 3×3"),
        (grey, "denoise", broken, [], "picture2.png is not a readable image"),
        (grey, "denoise", mixed, [], "all images must have one size"),
        (grey, "denoise", twice, [], "picture0.bmp and picture0.png would both become picture0.png"),
        (grey, "colorize", good, [], "needs a network of RGB images"),
        (grey, "inpaint", good, [], "inpaint needs --mask"),
        (grey, "inpaint", good, ["--mask", tmp_path / "other.png"], "the mask is 6×6, the images are 8×8"),
        (grey, "inpaint", good, ["--mask", tmp_path / "white.png"], "leaves no pixel known"),
        (grey, "inpaint", good, ["--mask", tmp_path / "black.png"], "leaves nothing to paint"),
        (grey, "inpaint", good, ["--mask", tmp_path / "text.png"], "text.png is not a readable picture"),
        (grey, "inpaint", good, ["--mask", tmp_path / "lost.png"], "lost.png is not a readable picture"),
        (grey, "denoise", good, ["--mask", tmp_path / "mask.png"], "--mask goes with --task inpaint"),
        (grey, "denoise", good, ["--factor", 2], "--factor goes with --task super-resolve"),
        (grey, "denoise", good, ["--noise-std", 0.2], "--noise-std goes with --evaluate"),
        (grey, "denoise", good, ["--teacher", "digits-uncond"], "--teacher goes with --evaluate"),
        (grey, "denoise", good, ["--teacher-noise-level", 0.1], "--teacher-noise-level goes with --evaluate"),
        (grey, "denoise", good, ["--evaluate", "--teacher-noise-level", 0.1], "goes with --teacher: name one"),
        (grey, "denoise", good, ["--evaluate", "--teacher", "digits-uncond", "--teacher-noise-level", 2], "not 2.0"),
        (grey, "denoise", good, ["--json"], "--json goes with --evaluate"),
        (grey, "denoise", good, ["--evaluate", "--noise-std", "inf"], "positive standard deviation, not inf"),
        (grey, "denoise", good, ["--evaluate", "--noise-std", -1], "positive standard deviation"),
        (grey, "denoise", good, ["--noise-level", 1.2], "noise level must be a number from 0 to 1, not 1.2"),
        (grey, "denoise", good, ["--noise-level", "nan"], "from 0 to 1, not nan"),
        (grey, "denoise", good, ["--rounds", -1], "rounds must be 0 or more"),
        (grey, "denoise", good, ["--seeds", "0-1"], "--seeds names 2, there are 3 images"),
        (grey, "denoise", good, ["--seeds", "a"], "neither a number nor a range"),
        (grey, "denoise", good, ["--num", 4], "has 3 images"),
        (grey, "denoise", good, ["--class", 1], "unconditional"),
        (grey, "denoise", good, ["--outdir", good], "which would be lost"),
        (grey, "denoise", good, ["--outdir", tmp_path / "made"], "picture1.png is a generated image, which would be"),
        ("digits-uncond", "denoise", good, [], "--network needs a student without a noise level"),
        ("digits-nothing", "denoise", good, [], "no network 'digits-nothing'"),
        (grey, "denoise", good, ["--evaluate", "--teacher", grey], "--teacher needs a network with a noise level"),
        (grey, "denoise", good, ["--evaluate", "--teacher", "digits-cond"], "choose an unconditional teacher"),
        (colour, "denoise", write_images(tmp_path / "rgb16", mode="RGB", size=16),
         ["--evaluate", "--teacher", "digits-uncond"], "choose a teacher of the same"),
    ]  # fmt: skip
    (tmp_path / "made").mkdir()
    save_png(tmp_path / "made" / "picture1.png", np.zeros((8, 8, 1), np.uint8), note_of({"network": "one"}))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for student, task, images, words, message in cases:
        outdir = [] if "--outdir" in words else ["--outdir", tmp_path / "out"]
        status, out, err = edit(capfd, student, task, images, "--grid", tmp_path / "g.png", *outdir, *words)
        assert status == 1 and not out and message in err and err.count("\n") == 1, (message, err)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, message
    status, _, err = edit(capfd, grey, "denoise", good)
    assert status == 1 and "nothing would be written: give --outdir, --grid or both" in err


def test_a_folder_that_cannot_be_written(tmp_path, capfd, students):
    images, file = write_images(tmp_path / "in"), Path(tmp_path / "file")
    file.write_text("")
    status, _, err = edit(capfd, students / "digits-uncond", "denoise", images, "--outdir", file / "out")
    assert status == 1 and "a part of the path is a file" in err.splitlines()[-1]

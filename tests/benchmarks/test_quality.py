"""The table of Fréchet distances: its figures are the metric's, its controls what they say."""

from __future__ import annotations

import csv

import pytest
import torch
from click.testing import CliRunner

from benchmarks import quality
from sign_fast import models
from sign_fast.checkpoints.store import find, read_config, save_network
from sign_fast.distill.pairs import network_hash
from sign_fast.metrics.digits_classifier import digits_distance
from sign_fast.sampling import ImageGenerator


def test_table(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    command = ["--network", "digits-cond", "--blocks", "2", "--num", "40", "--threads", "1", "--outdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmarks/quality.py", *command])
    done = CliRunner().invoke(quality.quality, command)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "quality.csv").open()))
    assert [(row["steps"], row["calls"]) for row in rows[:4]] == [("1", "1"), ("2", "3"), ("5", "9"), ("18", "35")]
    generator = ImageGenerator.from_pretrained("digits-cond")
    images = generator(range(80), 5).permute(0, 3, 1, 2)
    first, second = digits_distance(images[:40]), digits_distance(images[40:])
    row = {key: float(value) for key, value in rows[2].items() if key not in ("network", "weights")}
    assert row["first"] == pytest.approx(first) and row["mean"] == pytest.approx((first + second) / 2)
    assert (row["lowest"], row["highest"]) == pytest.approx((min(first, second), max(first, second)))
    assert row["all"] == pytest.approx(digits_distance(images))
    text = (tmp_path / "quality.md").read_text()
    assert "2 blocks of 40 images" in text and text.count("| digits-cond |") == 4
    assert asked == [1] and f", torch {torch.__version__}: `python benchmarks/quality.py --network" in text
    assert "commit " in text and str(tmp_path) not in text and f"--outdir {tmp_path.name}`" in text
    assert {row["weights"] for row in rows[:4]} == {network_hash(models.load("digits-cond"))[:12]}
    noise, constant, real = rows[4:]
    assert float(real["all"]) < float(noise["all"]) < float(constant["all"])


def test_runs_of_the_same_last_folder_are_told_apart(tmp_path, monkeypatch):
    config = {"cls": "EDMPrecond", "kwargs": read_config(find("digits-uncond"))["kwargs"]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "generated", lambda generator, steps, blocks, num: [])
    monkeypatch.setattr(quality, "distances", lambda images: {})
    found = []
    for run in ("one", "two"):
        net = models.load("digits-uncond")
        with torch.no_grad():
            next(net.parameters()).mul_(1.0 if run == "one" else 1.1)
        save_network(tmp_path / run / "best", net.state_dict(), config["cls"], config["kwargs"], role="teacher")
        found.append(next(quality.rows_of(f"{run}/best", 1, 2)))
    assert [row["network"] for row in found] == ["one/best", "two/best"]
    assert found[0]["weights"] != found[1]["weights"]
    assert next(quality.rows_of(str(tmp_path / "one" / "best"), 1, 2))["network"] == "one/best"


def test_a_student_is_measured_at_the_calls_it_was_made_for(monkeypatch):
    asked = []

    class Generator:
        image_shape, sampler, default_steps = (1, 8, 8), "few_step", 4

        def __call__(self, seeds, steps):
            asked.append((len(seeds), steps))
            return torch.randint(256, (len(seeds), 8, 8, 1), dtype=torch.uint8)

    monkeypatch.setattr(quality.ImageGenerator, "from_pretrained", lambda name: Generator())
    monkeypatch.setattr(quality, "read_config", lambda path: {"role": "student"})
    rows = list(quality.rows_of("digits-uncond", 2, 600))
    assert [(row["steps"], row["calls"]) for row in rows] == [(1, 1), (2, 2), (4, 4)]
    assert asked[:4] == [(500, 1), (100, 1)] * 2
    Generator.sampler = "recursive"
    assert [row["steps"] for row in quality.rows_of("digits-uncond", 1, 10)] == [1, 2, 3, 4]
    Generator.image_shape = (3, 32, 32)
    with pytest.raises(quality.SignFastError, match=r"makes \(3, 32, 32\) images: features are bundled"):
        list(quality.rows_of("digits-uncond", 1, 10))


def test_a_wrong_name_ends_in_one_line(tmp_path):
    done = CliRunner().invoke(quality.quality, ["--network", "digits-uncund", "--outdir", str(tmp_path / "out")])
    assert done.exit_code == 1 and done.output.startswith("error: ") and done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()

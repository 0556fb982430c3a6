"""The benchmark itself: what it writes, that it refuses wrong outputs, bad arguments. Nothing here asserts on time."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import ledger as book
from benchmarks import roofline
from benchmarks.providers import PROVIDERS, DropIn
from benchmarks.throughput import throughput

ROOT = Path(__file__).parents[2]


def run(*words, code=None):
    program = ["-c", code] if code else [str(ROOT / "benchmarks" / "throughput.py")]
    return subprocess.run([sys.executable, *program, *map(str, words)], capture_output=True, text=True, cwd=ROOT)


SHORT = ["--providers", "plain,sign_fast", "--batch", "1,3", "--seconds", 0, "--device", "cpu"]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """throughput.py in this process: words -> the rows of its report; small ceilings."""
    monkeypatch.setattr(roofline, "_CPU_SIZES", (64,))
    monkeypatch.setattr(roofline, "_CPU_ELEMENTS", 1 << 12)
    monkeypatch.setattr(roofline, "_SECONDS", 0.01)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # and is put back afterwards
    threads = torch.get_num_threads()
    roofline.measure.cache_clear()

    def rows(mode, *words):
        words = [*words, "--outdir", tmp_path, "--ledger", tmp_path / "ledger.csv", "--device", "cpu"]
        throughput.main([*map(str, words)], standalone_mode=False)
        found = json.loads((tmp_path / f"{mode}.json").read_text())
        assert found["mode"] == mode
        return found["rows"]

    yield rows
    roofline.measure.cache_clear()
    torch.set_num_threads(threads)


def test_latency(report, tmp_path, capsys):
    rows = report("latency", "--latency", "--providers", "plain,drop_in", "--seconds", 0, "--threads", 1)
    assert [(row["provider"], row["batch"], row["rounds"]) for row in rows] == [("plain", 1, 100), ("drop_in", 1, 100)]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] <= row["ms_p99"]
        assert "first_image_s" not in row and row["threads"] == 1
        seconds = max(row["gflop_per_call"] / row["matrix_tflop_s"] / 1e3, row["mb_per_call"] / row["copy_gb_s"] / 1e3)
        assert row["roofline"] == pytest.approx(seconds / (row["ms_p50"] / 1e3))
    assert os.environ["OMP_NUM_THREADS"] == "1"  # what child processes take over
    out = capsys.readouterr().out
    assert "p99" in out and "of roofline" in out and "ceilings: " in out
    written = book.read(tmp_path / "ledger.csv")
    assert [(row["mode"], row["threads"], row["steps"]) for row in written] == [("latency", "1", "1")] * 2
    assert float(written[0]["ms_p99"]) == rows[0]["ms_p99"]


def test_sweep(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.sweep._Series.takes_too_long", lambda *_: "")  # as on a machine that is not busy
    words = ["--sweep", "--batch", "2,1", "--steps", 2, "--seconds", 1.5, "--providers", "plain,sign_fast"]
    rows = report("sweep", *words, "--preset", "digits-cond")
    points = [(row["batch"], row["steps"], row["provider"]) for row in rows]
    assert points == [(b, k, name) for b in (1, 2) for k in (1, 2) for name in ("plain", "sign_fast")]
    assert all(row["images_per_second"] > 0 and row["rounds"] >= 3 for row in rows)
    assert "steps" in capsys.readouterr().out
    assert [row["steps"] for row in book.read(tmp_path / "ledger.csv")] == ["1", "1", "2", "2"] * 2
    assert Image.open(tmp_path / "sweep.png").size[0] > 600


def test_a_sweep_ends_where_the_time_does(report, tmp_path, capsys):
    words = ["--sweep", "--batch", "1,4,8", "--steps", 1, "--seconds", 0, "--providers", "plain", "--no-roofline"]
    rows = report("sweep", *words)
    assert [(row["batch"], "skipped" in row) for row in rows] == [(1, False), (4, True)]
    assert rows[1]["skipped"].startswith("timing batch 4 takes ") and "roofline" not in rows[0]
    assert "not run: timing batch 4" in capsys.readouterr().out
    assert len(book.read(tmp_path / "ledger.csv")) == 1


def test_launches_and_captured_bytes_are_reported_where_they_are_known(report, tmp_path, monkeypatch, capsys):
    class Counted(DropIn):
        def launches(self, batch):
            return 40 + batch

        def captured_bytes(self):
            return 3 << 20

    monkeypatch.setitem(PROVIDERS, "sign_fast", Counted)
    words = ["--batch", 2, "--seconds", 0, "--skip-cold", "--no-roofline", "--providers", "plain,sign_fast"]
    plain, ours = report("throughput", *words)
    assert (ours["launches"], ours["captured_mb"]) == (42, 3.0)
    assert "launches" not in plain and "captured_mb" not in plain
    assert "launches" in capsys.readouterr().out
    assert [row["launches"] for row in book.read(tmp_path / "ledger.csv")] == ["", "42"]


def test_cold(tmp_path):
    done = run("--cold", "--providers", "plain", "--threads", 1, "--no-ledger", "--outdir", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "cold.json").read_text())["rows"]
    assert row["rounds"] == 3 and row["threads"] == 1 and "images_per_second" not in row
    assert 0 < row["import_s"] < row["first_image_s"] and 0 < row["ready_s"] < row["first_image_s"]
    assert "import s" in done.stdout and "images/s" not in done.stdout
    assert done.stderr.count("in a fresh process") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["cold.json"]


def test_files(tmp_path):
    ledger = tmp_path / "ledger.csv"
    done = run(*SHORT, "--skip-cold", "--outdir", tmp_path, "--ledger", ledger)
    assert done.returncode == 0, done.stderr
    assert "sign_fast" in done.stdout and "vs plain" in done.stdout
    report = json.loads((tmp_path / "throughput.json").read_text())
    assert [(r["batch"], r["provider"]) for r in report["rows"]] == [
        (1, "plain"),
        (1, "sign_fast"),
        (3, "plain"),
        (3, "sign_fast"),
    ]
    for row in report["rows"]:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["rounds"] >= 3
    rows = list(csv.DictReader(ledger.open()))
    assert len(rows) == 4 and rows[0]["preset"] == "digits-uncond" and rows[0]["commit"]
    assert ledger.read_text().count("images_per_second") == 1
    assert str(ROOT) not in (rows[0]["command"].replace(str(tmp_path), ""))
    assert Image.open(tmp_path / "throughput.png").size[0] > 300


def test_fresh_processes_and_few_steps(tmp_path):
    words = [*SHORT, "--batch", "2", "--steps", "2", "--sampler", "edm", "--no-ledger", "--dtype", "bfloat16"]
    done = run(*words, "--preset", "digits-cond", "--outdir", tmp_path)
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "throughput.json").read_text())["rows"]:
        assert row["first_image_s"] > 0 and row["warm_up_s"] >= 0 and row["peak_mb"] > 50


def test_a_wrong_output_is_not_reported(tmp_path):
    code = (
        "import sys, sign_fast.sampling.plans as plans\n"
        "from benchmarks import throughput\n"
        "right = plans.few_step_plan\n"
        "plans.few_step_plan = lambda steps, **options: right(steps, 2.4)\n"
        "throughput.main()"
    )
    done = run(*SHORT, "--skip-cold", "--outdir", tmp_path, "--ledger", tmp_path / "ledger.csv", code=code)
    assert done.returncode == 1
    assert "an output is wrong: sign_fast" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch", "0"], "not a list of whole numbers"),
        (["--providers", "plain,magic"], "unknown provider 'magic'"),
        (["--preset", "nowhere"], "no network 'nowhere'"),
        (["--steps", "0"], "--steps"),
        (["--threads", "0"], "--threads"),
        (["--latency", "--sweep"], "--latency and --sweep are two measurements: name one"),
        (["--latency", "--batch", "1,2"], "--latency is measured at batch 1"),
        (["--cold", "--skip-cold"], "--cold measures what --skip-cold leaves out"),
        (["--device", "cuda:77"], "is not here"),
        (["--outdir", "Makefile/x"], "cannot write"),
    ],
)
def test_bad_arguments(words, message, tmp_path):
    done = run("--outdir", tmp_path, "--no-ledger", *words)
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())

"""The benchmark itself: what it writes, that it refuses wrong outputs, bad arguments. Nothing here asserts on time."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*words, code=None):
    program = ["-c", code] if code else [str(ROOT / "benchmarks" / "throughput.py")]
    return subprocess.run([sys.executable, *program, *map(str, words)], capture_output=True, text=True, cwd=ROOT)


SHORT = ["--providers", "plain,sign_fast", "--batch", "1,3", "--seconds", 0, "--device", "cpu"]


def test_files(tmp_path):
    ledger = tmp_path / "ledger.csv"
    for _ in range(2):
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
    assert len(rows) == 8 and rows[0]["preset"] == "digits-uncond" and rows[0]["commit"]
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
        "import sys, sign_fast.models.unet_block as b\n"
        "from benchmarks import throughput\n"
        "b._scaled_sum = lambda a, c, s: a + c\n"
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
        (["--device", "cuda:77"], "is not here"),
        (["--outdir", "Makefile/x"], "cannot write"),
    ],
)
def test_bad_arguments(words, message, tmp_path):
    done = run("--outdir", tmp_path, "--no-ledger", *words)
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())

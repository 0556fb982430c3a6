"""The benchmark of Stable Diffusion's UNets: the real ones, at a small size."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import diffusers_unet
from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers.published import UNETS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "diffusers_unet.py"


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "--threads", "1", *words], capture_output=True, text=True)


def test_a_call_of_stable_diffusion_15(tmp_path):
    """All 860 M weights, in bfloat16 that they and their copy in another format take 4 GB."""
    book = tmp_path / "ledger.csv"
    words = ["--size", "8", "--dtype", "bfloat16", "--providers", "plain,sign_fast", "--rounds", "1", "--seconds", "0"]
    done = _run(*words, "--outdir", str(tmp_path), "--ledger", str(book))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "diffusers_unet.json").read_text())
    assert report["parameters"] == 859_520_964  # the published checkpoint's
    assert [row["provider"] for row in report["rows"]] == ["plain", "sign_fast"]
    assert "GroupNorm–SiLU" in report["changed"] and "left:" in report["changed"]
    rows = list(csv.DictReader(book.open()))
    assert [row["mode"] for row in rows] == ["diffusers"] * 2 and {row["preset"] for row in rows} == {"sd15@8"}
    assert all(float(row["ms_p50"]) > 0 for row in rows) and 0 < float(rows[1]["relative_error"]) < 0.1
    assert "sign_fast" in done.stdout and "off plain" in done.stdout


@pytest.mark.parametrize("network", UNETS)
def test_the_configurations_are_the_published_ones(network):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(**UNETS[network])
    count = {"sd15": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[network]
    assert sum(p.numel() for p in net.parameters()) == count


def test_a_provider_that_differs_is_not_timed():
    y = torch.ones(1, 2)
    calls = {"plain": lambda: y, "sign_fast": lambda: y * 1.01}
    with pytest.raises(SignFastError, match=r"sign_fast differs from plain by 1\.00e-02"):
        diffusers_unet.compare(calls, "float32")
    with pytest.raises(SignFastError, match="differs from plain by nan"):
        diffusers_unet.compare(calls | {"sign_fast": lambda: y * float("nan")}, "float32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--providers", "plain,tensorrt"], "unknown provider 'tensorrt'"),
        (["--size", "12"], "--size 12 does not halve three times"),
        (["--network", "flux"], "Invalid value for '--network'"),
    ],
    ids=["provider", "size", "network"],
)
def test_bad_arguments_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers_unet.py", *words, "--outdir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        diffusers_unet.main()
    told = capsys.readouterr()
    assert ended.value.code in (1, 2) and not told.out
    assert len(told.err.splitlines()) == 1 and told.err.startswith("diffusers_unet: error: ") and message in told.err
    assert not (tmp_path / "out").exists()

"""What the timing of launches writes. Nothing here asserts on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("sign_fast._launcher", reason="the launcher is not built")


def test_launch_overhead_without_a_gpu(tmp_path, triton_cache_folder):
    out = tmp_path / "overhead.json"
    command = [sys.executable, "benchmarks/launch_overhead.py", "--device", "cpu", "--seconds", "0", "--out", str(out)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(triton_cache_folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "packing only" in done.stdout
    report = json.loads(out.read_text())
    assert {"device", "commit", "command"} <= report["environment"].keys()
    assert len(report["rows"]) == 3
    for row in report["rows"]:
        assert row["provider"] == "sign_fast" and row["what"].startswith("packing only")
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"] and row["rounds"] == 20
        assert row["parameters"] > row["tensors"] > 1

"""sign-fast build-cubins: packs for a network of one's own, and everything that can be wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sign_fast.kernels.packs.store import Pack
from tests.cli.test_generate import run
from tests.tiny_runs import write_teacher

triton = pytest.importorskip("triton")


def test_packs_for_a_network_of_ones_own(tmp_path, capfd, monkeypatch):
    """Of a folder, or of the run that it came from; the network is recorded once, and a few of its calls compiled."""
    from sign_fast.deployment import recording

    everything, recorded = recording.calls_of, []

    def few_calls(*network):
        if not recorded:
            recorded.append((network, dict.fromkeys(list(everything(*network, dtypes=(torch.float32,)))[:3])))
        assert network == recorded[0][0]
        return recorded[0][1]

    monkeypatch.setattr(recording, "calls_of", few_calls)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    write_teacher(run_folder / "network")
    found = []
    for name in (run_folder, run_folder / "network"):
        words = ["--archs", "9.0", "--network", name, "--outdir", tmp_path / f"packs{len(found)}", "--jobs", 1]
        status, out, err = run(capfd, "build-cubins", *words)
        assert status == 0, err
        assert out.startswith(str(tmp_path / f"packs{len(found)}" / "sm_90.zip")) and out.endswith(" MiB\n")
        found.append(Pack(tmp_path / f"packs{len(found)}" / "sm_90.zip"))
    assert found[0].networks == [str(run_folder)] and found[0].keys == found[1].keys and found[0].keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name --archs"),
        (["--archs", " "], "name --archs"),
        (["--archs", "7.5"], "older than 8.0"),
        (["--archs", "8.8"], "not one of the known architectures"),
        (["--archs", "9.0", "--presets", "nothing"], "unknown network 'nothing': known are cifar10-uncond-vp"),
        (["--archs", "9.0", "--presets", ";"], "no network is named"),
        (["--archs", "9.0", "--network", "nothing"], "no network 'nothing'"),
        (["--archs", "9.0", "--network", "sdxl"], "sdxl goes with --presets"),
        (["--archs", "9.0", "--presets", "digits-cond", "--outdir", "/proc/x"], "choose another --outdir"),
    ],
)
def test_bad_input_is_one_line(capfd, monkeypatch, words, message):
    monkeypatch.delenv("SIGN_FAST_ARCHS", raising=False)
    status, _, err = run(capfd, "build-cubins", *words)
    assert status == 1 and message in err and err.count("\n") == 1, err


def test_without_triton_it_says_so(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    status, _, err = run(capfd, "build-cubins", "--archs", "9.0", "--presets", "digits-cond")
    assert status == 1 and "packs are compiled by Triton, which is not installed: pip install triton" in err


SOON = """
from sign_fast.cli.main import main
from sign_fast.kernels.packs import calls
few = {name: own[:30] for name, own in calls.networks().items()}  # what they compile to is known soon
calls.networks = lambda: few
main()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_after_it_was_ended(tmp_path, how):
    """Neither compiling processes nor half a pack; files of the assembler go with the folder that they are in."""
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-c", SOON, "build-cubins", "--archs", "9.0", "--presets", "digits-cond"]
    command += ["--outdir", str(tmp_path / "packs"), "--jobs", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def children():
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    workers = []
    for _ in range(600):
        workers = children()
        if len(workers) >= 2 and list((tmp_path / "tmp").glob("*/*")):  # it compiles
            break
        time.sleep(0.1)
    assert workers
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    for _ in range(100):
        alive = [pid for pid in workers if os.path.exists(f"/proc/{pid}") and not _ended(pid)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive and list((tmp_path / "packs").iterdir()) == []
    if how == signal.SIGTERM:
        assert process.returncode == 130 and err.count("\n") == 1 and "interrupted" in err, err
        assert list((tmp_path / "tmp").iterdir()) == []


def _ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True

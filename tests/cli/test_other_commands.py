"""info, evaluate and train on the command line, and what `import sign_fast` costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sign_fast import models, optimize
from sign_fast.cli.info import gather
from sign_fast.inference.launches import launches
from sign_fast.kernels import extension
from sign_fast.models import presets
from sign_fast.sampling.graphs import GraphKey, Graphs
from tests.cli.test_generate import run
from tests.stand_in_capture import StandIn


def test_info_tells_what_is_here(capfd):
    status, out, _ = run(capfd, "info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["C++ extension"]["loaded"] == ("yes" if extension.missing() is None else "no")
    sections = {"versions", "C++ extension", "built with", "devices", "operations", "machine code", "CUDA graphs"}
    assert set(facts) == sections | {"networks", "switches"}
    assert "digits-uncond" in facts["networks"]["bundled"]


def test_info_tells_of_graphs(monkeypatch):
    monkeypatch.delenv("SIGN_FAST_DISABLE_GRAPHS", raising=False)
    assert gather()["CUDA graphs"] == {
        "generations": "captured on CUDA; SIGN_FAST_DISABLE_GRAPHS=1 turns it off",
        "captured in this process": "none",
    }
    monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
    graphs = Graphs("cpu", capture=StandIn)
    assert gather()["CUDA graphs"]["generations"] == "run without, SIGN_FAST_DISABLE_GRAPHS=1"
    monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "0")
    key = GraphKey(0, 4, "plan", torch.float32, False, "torch", "float")
    graphs.run(key, {"x": torch.zeros(4, 2**18)}, lambda inputs: inputs["x"] + 1, list)
    assert gather()["CUDA graphs"]["captured in this process"] == "1 on cpu, 8.0 MiB"


def test_info_gives_the_reason(capfd):
    environment = {**os.environ, "SIGN_FAST_DISABLE_EXT": "1"}
    words = [sys.executable, "-m", "sign_fast.cli", "info"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert "switched off by SIGN_FAST_DISABLE_EXT=1" in done.stdout


@pytest.mark.parametrize(
    ("name", "dtype", "network", "sampler"),
    [
        ("digits-cond", "float32", "EDMPrecond, 1x8x8, 10 classes, ", "edm"),
        ("digits-uncond", "bfloat16", "EDMPrecond, 1x8x8, 0 classes, ", "edm"),
    ],
)
def test_info_tells_of_a_network(capfd, name, dtype, network, sampler):
    pytest.importorskip("triton")
    status, out, _ = run(capfd, "info", "--json", "--network", name, "--dtype", dtype, "--device", "cpu")
    facts = json.loads(out)[f"network {name}"]
    assert status == 0 and set(facts) == {"network", "launches of a forward", "inference copy", "conditioning"}
    assert facts["network"].startswith(network) and facts["conditioning"].endswith(sampler)
    net = models.load(name, "cpu")
    before, after = launches(net, dtype=getattr(torch, dtype)), optimize(net, getattr(torch, dtype)).launches()
    assert after.total() < before.total()
    assert facts["launches of a forward"].startswith(f"{before.total()} plain, {after.total()} optimized")


def test_info_of_a_preset_and_of_nothing(capfd, monkeypatch):
    monkeypatch.setitem(presets._table(), "tiny", presets._table()["digits-uncond"])
    status, out, _ = run(capfd, "info", "--network", "tiny", "--device", "cpu")
    assert status == 0 and "network tiny\n" in out and "EDMPrecond, 1x8x8" in out and "for the default sampler" in out
    status, out, err = run(capfd, "info", "--network", "nowhere")
    assert status == 1 and not out and "nowhere" in err and err.count("\n") == 1
    status, out, err = run(capfd, "info", "--network", "tiny", "--device", "gpu")
    assert status == 1 and not out and "device 'gpu' is not a device" in err and err.count("\n") == 1


def test_evaluate(tmp_path, capfd):
    assert run(capfd, "generate", "--network", "digits-uncond", "--outdir", tmp_path, "--num", 50, "--steps", 2)[0] == 0
    status, out, _ = run(capfd, "evaluate", "--images", tmp_path, "--json")
    assert status == 0 and json.loads(out)["images"] == 50
    status, out, _ = run(capfd, "evaluate", "--network", "digits-uncond", "--num", 20, "--steps", 2)
    assert status == 0 and out.startswith("Fréchet distance ")


@pytest.mark.parametrize(
    "words, message",
    [
        (["evaluate"], "give either --network or --images"),
        (["evaluate", "--images", "nowhere"], "no data set at nowhere"),
        (["train", "--data", "nowhere", "--outdir", "OUT"], "no data set at nowhere"),
        (
            ["train", "--data", "digits", "--preset", "cifar10-uncond-vp", "--outdir", "OUT"],
            "the network takes (3, 32, 32)",
        ),
        (["train", "--data", "digits", "--preset", "digit-uncond", "--outdir", "OUT"], "did you mean 'digits-uncond'"),
        (
            ["train", "--data", "digits", "--preset", "digits-uncond", "--cbase", "16", "--outdir", "OUT"],
            "already says --cbase",
        ),
        (["train", "--data", "digits", "--cres", "1,2,x", "--outdir", "OUT"], "not a list of whole numbers"),
        (["train", "--data", "digits", "--cres", "1,1,1,1,1", "--outdir", "OUT"], "cannot be halved 4 times"),
        (["train", "--data", "digits", "--preset", "digits-uncond", "--lr", "-1", "--outdir", "OUT"], "--lr"),
    ],
)
def test_bad_input(tmp_path, capfd, words, message):
    status, _, err = run(capfd, *[str(tmp_path / "run") if word == "OUT" else word for word in words])
    assert status != 0 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_train_with_an_architecture_of_its_own(tmp_path, capfd):
    words = [
        "train",
        "--data",
        "digits",
        "--arch",
        "ncsnpp",
        "--precond",
        "ve",
        "--cond",
        "--cbase",
        8,
        "--cres",
        "1,2",
    ]
    words += ["--batch", 8, "--batch-gpu", 4, "--duration", 0.000016, "--outdir", tmp_path / "run"]
    status, _, err = run(capfd, *words)
    assert status == 0, err
    config = json.loads((tmp_path / "run" / "network" / "config.json").read_text())
    assert config["cls"] == "VEPrecond" and config["kwargs"]["label_dim"] == 10
    generate = ["generate", "--network", tmp_path / "run" / "network", "--outdir", tmp_path / "out"]
    assert run(capfd, *generate, "--num", 2, "--steps", 2)[0] == 0


def test_import_loads_nothing_heavy():
    heavy = "('torch', 'triton', 'PIL', 'numpy')"
    code = f"import sys, sign_fast; print(sorted(m for m in sys.modules if m.split('.')[0] in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_every_operation_compiles_and_loads_nothing():
    code = (
        "import sys, torch; threads = torch.get_num_threads(); import sign_fast.functional, sign_fast.models, "
        "sign_fast.sampling; assert 'triton' not in sys.modules and 'sign_fast._C' not in sys.modules; "
        "assert not torch.cuda.is_initialized() and torch.get_num_threads() == threads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

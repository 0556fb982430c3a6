"""`sign-fast evaluate` as a user runs it: networks, images, references, processes, cards, and what can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from sign_fast.checkpoints.store import find, read_config
from tests.checkpoints.snapshots import tiny_snapshot
from tests.cli.test_generate import run
from tests.data.test_datasets import write as write_folder
from tests.metrics import stand_in

ALL = "fid,kid,is,precision,recall"
FIGURES = ["KID", "KID deviation", "inception score", "inception score deviation", "precision", "recall"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("network") / "inception.pt")


def evaluate(capfd, *words):
    status, out, err = run(capfd, "evaluate", "--device", "cpu", *words)
    assert status == 0, err
    return json.loads(out) if "--json" in words else out


def statistics(path, dim=stand_in.FEATURES):
    np.savez(path, mu=np.zeros(dim), sigma=np.eye(dim))
    return path


def test_digits_with_every_metric(capfd):
    facts = evaluate(capfd, "--network", "digits-sid", "--num", 40, "--metric", ALL, "--json")
    assert list(facts)[:7] == ["Fréchet distance", *FIGURES]
    rest = {name: value for name, value in facts.items() if name not in ("Fréchet distance", *FIGURES)}
    assert rest.pop("features sha256") == "4c53ffee10fb"  # of the file in this tree
    assert rest == {
        "images": 40,
        "seeds": "0-39",
        "steps": 1,
        "sampler": "few-step",
        "reference": "digits",
        "features of": "the digits classifier",
        "KID subsets": "100 of 40, seed 0",
    }


def test_seeds_are_the_images_of_generate(tmp_path, capfd):
    seeds = ["--seeds", "7-30", "--steps", 2]
    assert (
        run(capfd, "generate", "--network", "digits-uncond", "--outdir", tmp_path / "a", *seeds, "--batch", 24)[0] == 0
    )
    by_files = evaluate(capfd, "--images", tmp_path / "a", "--json")
    facts = evaluate(capfd, "--network", "digits-uncond", *seeds, "--json")
    assert facts["Fréchet distance"] == by_files["Fréchet distance"] and facts["seeds"] == "7-30"
    facts = evaluate(capfd, "--network", "digits-uncond", "--seeds", "9,7,5-30", "--num", 4, "--steps", 2, "--json")
    assert facts["images"] == 4 and facts["seeds"] == "9,7,5-30"


def test_reference_of_one_s_own(tmp_path, capfd, network):
    real, fake = write_folder(tmp_path / "real", count=30), write_folder(tmp_path / "fake", count=20, size=16)
    inception = ["--inception", network]
    out = evaluate(capfd, "--images", real, *inception, "--save-reference", tmp_path / "ref.npz", "--save-features")
    assert out.startswith("images 30, features of inception.pt") and str(tmp_path / "ref.npz") in out
    words = ["--images", fake, *inception, "--metric", ALL, "--kid-subset-size", 10, "--splits", 5, "--json"]
    by_file = evaluate(capfd, *words, "--reference", tmp_path / "ref.npz")
    by_images = evaluate(capfd, *words, "--reference", real)
    assert list(by_file)[:7] == ["FID", *FIGURES] and by_file["KID subsets"] == "100 of 10, seed 0"
    assert by_file["reference"] == "ref.npz" and len(by_file["reference sha256"]) == 12
    for name in ("FID", *FIGURES):
        assert by_file[name] == pytest.approx(by_images[name], rel=1e-3, abs=2e-3), name
    other = evaluate(capfd, *words, "--reference", real, "--kid-seed", 1)
    assert other["KID"] != by_images["KID"] and other["FID"] == by_images["FID"]
    # the first so many, and a figure beside the reference
    first = ["--images", real, "--num", 10, *inception, "--reference", real, "--json"]
    facts = evaluate(capfd, *first, "--save-reference", tmp_path / "ten.npz")
    assert facts["images"] == 10 and facts["FID"] > 0 and facts["saved"] == str(tmp_path / "ten.npz")
    with np.load(tmp_path / "ten.npz") as file:
        assert file["count"] == 10 and "features" not in file.files


def test_grey_images_are_said_to_be_repeated(capfd, network, tmp_path):
    words = ["--network", "digits-sid", "--num", 20, "--inception", network]
    facts = evaluate(capfd, *words, "--reference", statistics(tmp_path / "ref.npz"), "--json")
    assert facts["channels"] == "grey, repeated to 3" and facts["FID"] > 0


def test_result_goes_into_the_card(tmp_path, capfd):
    folder = tmp_path / "net"
    shutil.copytree(find("digits-sid"), folder)
    words = ["--network", folder, "--num", 30, "--metric", "fid,recall", "--dtype", "bfloat16", "--record", "--json"]
    facts = evaluate(capfd, *words)
    assert read_config(folder)["quality"] == facts and facts["dtype"] == "bfloat16"
    assert f"- Fréchet distance: {facts['Fréchet distance']}" in (folder / "README.md").read_text()


def test_what_was_measured_is_shown_though_it_cannot_be_written(tmp_path, capfd):
    (tmp_path / "ref.npz").mkdir()
    status, out, err = run(
        capfd, "evaluate", "--device", "cpu", "--network", "digits-sid", "--num", 10, "--metric", "fid",
        "--save-reference", tmp_path / "ref.npz",
    )  # fmt: skip
    assert status == 1 and out.startswith("Fréchet distance ") and "saved" not in out
    assert err.splitlines()[-1].startswith("sign-fast: error: cannot write")


def launch(*words, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "sign_fast.cli", "evaluate", *map(str, words), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_two_processes_give_what_one_does(tmp_path, capfd, network):
    real = tmp_path / "real.npz"  # one batch: the second process has none of it
    np.savez(real, np.stack([np.full((8, 8, 3), 30 * i, np.uint8) for i in range(8)]))
    words = ["--network", "digits-sid", "--seeds", "0-25", "--inception", network, "--reference", real]
    words += ["--metric", ALL, "--batch", 10, "--splits", 3, "--json"]
    one = evaluate(capfd, *words, "--save-reference", tmp_path / "one.npz", "--save-features")
    done = launch(*words, "--save-reference", tmp_path / "two.npz", "--save-features")
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one line, of the first process
    assert one.pop("saved") != two.pop("saved") and list(two) == list(one)
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=1e-4, abs=2e-3) if isinstance(value, float) else value), name
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "two.npz") as b:
        for name in ("mu", "sigma", "features"):
            assert np.allclose(a[name], b[name], rtol=1e-4, atol=1e-4), name
        assert a["features"].std(0).max() > 0.1  # so that another order would be seen


def test_what_one_process_meets_ends_all_in_one_line(tmp_path, network):
    folder = write_folder(tmp_path / "a", count=12)
    broken = sorted(folder.rglob("*.png"))[5]  # in the second batch of 4: the second process reads it
    broken.write_bytes(b"\x89PNG")
    words = ["--images", folder, "--inception", network, "--batch", 4, "--save-reference", tmp_path / "ref.npz"]
    done = launch(*words)
    lines = [line for line in done.stderr.splitlines() if "sign-fast: error" in line]
    assert (
        done.returncode != 0
        and len(lines) == 1
        and "(process 0)" in lines[0]
        and "img00000005.png is not a readable image" in lines[0]
    )
    assert not (tmp_path / "ref.npz").exists()


def test_bad_arguments(tmp_path, capfd, network):
    colour = write_folder(tmp_path / "colour", count=5)
    own = ["--inception", network]
    moments = statistics(tmp_path / "moments.npz")
    (tmp_path / "cut.npz").write_bytes(moments.read_bytes()[:900])
    (tmp_path / "bad.pt").write_bytes(b"PK")
    save = ["--save-reference", tmp_path / "new.npz"]
    snapshot = tmp_path / "edm-x.pkl"
    snapshot.write_bytes(tiny_snapshot())
    cases = [
        (["--images", colour, "--network", "digits-sid"], "give either --network or --images"),
        (["--images", colour, "--record", "--seeds", "3"], "--record, --seeds go with --network"),
        (["--images", colour, "--metric", "fid,lpips"], "no metric 'lpips': there are fid, kid, is, precision, recall"),
        (["--images", colour, "--metric", ""], "no metric ''"),
        (["--images", colour], "has 3×8×8 images, and the bundled features know 1×8×8 digits: give --inception FILE"),
        (["--images", colour, *own], "fid compare with real images: give --reference"),
        (["--images", colour, *own, "--reference", tmp_path / "no.npz"], "no file"),
        (["--images", colour, *own, "--reference", tmp_path / "cut.npz"], "is not a whole .npz file"),
        (["--images", colour, *own, "--reference", moments, "--metric", "fid,kid"], "kid cannot be had from"),
        (["--images", colour, *own, "--reference", statistics(tmp_path / "b.npz", 9)], "has 9 features an image"),
        (["--images", colour, *own, "--metric", "is"], "in 10 parts needs as many images, not 5"),
        (["--images", colour, *own, "--reference", colour, "--metric", "kid", "--kid-subset-size", 6], "not 5"),
        (["--images", colour, *own, "--metric", "is", "--reference", colour], "compares with nothing"),
        (["--images", colour, *own, "--reference", moments, "--num", 6], "holds 5 images, not 6"),
        (["--images", tmp_path / "nowhere", *own, "--reference", moments], "no data set at"),
        (["--images", colour, "--inception", tmp_path / "no.pt"], "no Inception file"),
        (["--images", colour, "--inception", tmp_path / "bad.pt", *save], "is not a whole TorchScript file"),
        (["--images", colour, *own, "--save-features"], "--save-features goes with --save-reference"),
        (["--images", colour, *own, "--save-reference", tmp_path / "new.pkl"], "written as .npz: name it"),
        (["--network", "digits-sid", "--save-reference", tmp_path / "no" / "new.npz", "--num", 10], "no folder"),
        (["--network", "digits-sid", "--seeds", "3"], "holds 1 image: quality needs at least 2"),
        (["--network", "digits-sid", "--seeds", "0-4", "--num", 9], "--seeds names 5 seeds, not 9"),
        (["--network", "digits-sid", "--seeds", "3,3"], "seed 3 is there twice"),
        (["--network", snapshot, "--record"], "--record writes into a network's folder, which"),
        (["--network", "digits-sid", "--record", *save], "--record needs something to record"),
        (["--network", "nowhere"], "no network 'nowhere'"),
        (["--network", "digits-sid", "--num", 1], "--num"),
    ]
    for words, message in cases:
        status, out, err = run(capfd, "evaluate", "--device", "cpu", *words)
        last = err.splitlines()[-1]
        assert status in (1, 2) and not out and message in last, (words, err)
        assert last.startswith("sign-fast: error: ") and sum("error" in line for line in err.splitlines()) == 1, words
    assert not (tmp_path / "new.npz").exists()


def test_the_bar_goes_to_standard_error(capfd):
    status, out, err = run(capfd, "evaluate", "--images", "digits", "--num", 30)
    assert status == 0 and out.count("\n") == 1 and out.startswith("Fréchet distance ") and "30/30" in err

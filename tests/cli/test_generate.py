"""`sign-fast generate` as a user runs it: names, resuming, processes, and everything that can be wrong."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sign_fast.checkpoints.store import bundled_names, find
from sign_fast.cli.main import main
from sign_fast.cli.origin import fingerprint
from sign_fast.sampling import ImageGenerator, SeededNoise, pictures
from sign_fast.sampling.pictures import PngWriter


def run(capfd, *words):
    """Exit status, standard output and standard error of `sign-fast WORDS`, in this process."""
    try:
        main([str(word) for word in words])
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    out, err = capfd.readouterr()
    return status, out, err


def generate(capfd, outdir, *words, network="digits-uncond"):
    return run(capfd, "generate", "--network", network, "--outdir", outdir, "--device", "cpu", "--steps", 3, *words)


def files(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_names_sizes_and_grid(tmp_path, capfd):
    status, out, _ = generate(
        capfd, tmp_path / "a", "--seeds", "0-2,1007", "--subdirs", "--grid", tmp_path / "g" / "grid.png"
    )
    assert status == 0 and "4 images" in out
    assert list(files(tmp_path / "a")) == [
        "000000/000000.png",
        "000000/000001.png",
        "000000/000002.png",
        "001000/001007.png",
    ]
    picture = Image.open(tmp_path / "a" / "000000" / "000001.png")
    assert picture.size == (8, 8) and picture.mode == "L"
    grid = np.asarray(Image.open(tmp_path / "g" / "grid.png"))
    assert min(grid.shape) > 400 and grid.std() > 20


def test_resumes_and_gives_the_same_bytes(tmp_path, capfd):
    generate(capfd, tmp_path / "whole", "--seeds", "0-9", "--batch", 4)
    whole = files(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    for name in ("000000.png", "000005.png"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "part" / name)
    before = (tmp_path / "part" / "000005.png").stat().st_mtime_ns
    status, out, _ = generate(capfd, tmp_path / "part", "--seeds", "0-9", "--batch", 4)
    assert status == 0 and "2 were there already" in out
    assert files(tmp_path / "part") == whole
    assert (tmp_path / "part" / "000005.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "network", "message"),
    [
        ([], "digits-cond", "made with another network"),
        (["--steps", 3], "digits-uncond", "made with steps 2, not 3"),
        (["--steps", 2, "--dtype", "bfloat16"], "digits-uncond", "made with dtype 'float32', not 'bfloat16'"),
        (["--steps", 2, "--rho", 5], "digits-uncond", "made with rho none, not 5.0"),
        (["--steps", 2, "--noise", "philox"], "digits-uncond", "made with noise 'torch', not 'philox'"),
    ],
    ids=["network", "steps", "dtype", "option", "noise"],
)
def test_images_made_otherwise_are_not_taken_for_these(words, network, message, tmp_path, capfd):
    generate(capfd, tmp_path, "--seeds", "0,1", "--steps", 2)
    before = files(tmp_path)
    status, _, err = generate(capfd, tmp_path, "--seeds", "1,2", *words, network=network)
    assert status == 1 and f"000001.png is there already, {message}: choose another --outdir" in err
    assert files(tmp_path) == before


def test_an_image_of_another_program_is_not_taken_for_one(tmp_path, capfd):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "000001.png")
    status, _, err = generate(capfd, tmp_path, "--seeds", "0-2")
    assert status == 1 and "000001.png is there already and does not tell what made it" in err
    assert len(files(tmp_path)) == 1


def test_a_network_is_known_wherever_it_lies(tmp_path):
    from sign_fast.checkpoints.store import find

    shutil.copytree(find("digits-uncond"), tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(find("digits-uncond")) != fingerprint(find("digits-cond"))
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert fingerprint(tmp_path / "copy") != fingerprint(find("digits-uncond"))


def test_num_and_class(tmp_path, capfd):
    assert generate(capfd, tmp_path / "a", "--num", 3)[0] == 0
    assert list(files(tmp_path / "a")) == ["000000.png", "000001.png", "000002.png"]
    assert generate(capfd, tmp_path / "b", "--num", 2, "--class", 7, network="digits-cond")[0] == 0
    assert generate(capfd, tmp_path / "c", "--num", 2, network="digits-cond")[0] == 0
    assert files(tmp_path / "b") != files(tmp_path / "c")


def test_published_sampler_options(tmp_path, capfd):
    words = ["--sigma_min", 0.01, "--sigma_max", 50, "--rho", 5, "--S_churn", 4, "--S_min", 0.05, "--S_max", 50]
    assert generate(capfd, tmp_path / "a", "--num", 1, *words, "--S_noise", 1.003)[0] == 0
    words = ["--solver", "euler", "--disc", "vp", "--schedule", "vp", "--scaling", "vp"]
    assert generate(capfd, tmp_path / "b", "--num", 1, *words)[0] == 0
    assert (
        run(capfd, "generate", "--network", "digits-uncond", "--outdir", tmp_path / "c", "--num", 1, "--sigma_G", 2.5)[
            0
        ]
        == 0
    )
    assert len({*files(tmp_path / "a").values(), *files(tmp_path / "b").values(), *files(tmp_path / "c").values()}) == 3


def test_torchrun_gives_the_same_bytes(tmp_path, capfd):
    words = ["--network", "digits-cond", "--seeds", "0-20", "--batch", "4", "--steps", "2", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cli = ["-m", "sign_fast.cli", "generate", *words]
    one = [sys.executable, *cli, "--outdir", str(tmp_path / "one")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *cli]
    two += ["--outdir", str(tmp_path / "two"), "--grid", str(tmp_path / "grid.png")]
    for command in (one, two):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert len(files(tmp_path / "one")) == 21
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert (tmp_path / "grid.png").exists()


def broken(tmp_path, change):
    folder = tmp_path / "net"
    shutil.copytree(find("digits-uncond"), folder)
    change(folder)
    return folder


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def foreign(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.")


def rewrite(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["kwargs"] |= changes.pop("kwargs", {})
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def not_json(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "change, message",
    [
        (truncate, "not a whole safetensors file"),
        (foreign, "not a whole safetensors file"),
        (no_weights, "holds no model.safetensors"),
        (not_json, "not readable as JSON"),
        (rewrite(cls="os.system"), "cls must be one of"),
        (rewrite(format="other"), "not a network of this library"),
        (rewrite(kwargs={"model_channels": 16}), "weights and configuration are of different networks"),
        (rewrite(kwargs={"num_blocks": 2}), "lacks model."),
        (rewrite(kwargs={"nonsense": 1}), "nonsense"),
        (rewrite(role="judge"), "role must be teacher or student"),
    ],
)
def test_bad_network_folder(tmp_path, capfd, change, message):
    folder = broken(tmp_path, change)
    status, _, err = generate(capfd, tmp_path / "out", network=folder)
    assert status == 1 and message in err
    assert err.startswith("sign-fast: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (Path.cwd() / "executed").exists()


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["--steps", "-1"], 2, "--steps"),
        (["--steps", "0"], 2, "--steps"),
        (["--batch", "x"], 2, "--batch"),
        (["--seeds", ""], 1, "neither a number nor a range"),
        (["--seeds", "5-1"], 1, "runs backwards"),
        (["--seeds", "a-b"], 1, "write e.g. 0-63,70"),
        (["--class", "3"], 1, "unconditional"),
        (["--network", "digits-cond", "--class", "10"], 1, "classes 0 to 9"),
        (["--network", "digits-cond", "--class", "-1"], 1, "classes 0 to 9"),
        (["--network", "nowhere"], 1, "bundled: " + ", ".join(bundled_names())),
        (["--network", "cifar10-uncond-vp"], 1, "preset without weights"),
        (["--network", "Makefile"], 1, "is a file"),
        (["--device", "cuda:99"], 1, "is not here"),
        (["--device", "toaster"], 1, "not a device"),
        (["--sigma_G", "2.5", "--rho", "7"], 1, "only a teacher's sampler takes --rho, and"),
        (["--nonsense"], 2, "--nonsense"),
        (["--seeds", "1-3,2"], 1, "seed 2 is there twice"),
        (["--seeds", "9223372036854775808"], 1, "seed 9223372036854775808 is out of range"),
        (["--seeds", "0-99999999999999"], 1, "more than 100,000,000 images"),
        (["--num", "99999999999999"], 1, "more than 100,000,000 images"),
        (["--network", "nowhere", "--seeds", "7,7"], 1, "seed 7 is there twice"),
        (["--workers", "0"], 2, "--workers"),
        (["--noise", "sobol"], 2, "--noise"),
        (["--dtype", "int8"], 2, "--dtype"),
    ],
)
def test_bad_arguments(tmp_path, capfd, words, status, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    got, _, err = generate(capfd, tmp_path / "out", *words)
    assert got == status and message in err
    assert err.startswith("sign-fast: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folder_that_is_a_file(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    status, _, err = generate(capfd, tmp_path / "file" / "out", "--num", 1)
    assert status == 1 and "cannot write" in err and err.count("\n") == 1


@pytest.mark.skipif(
    os.geteuid() == 0 and not os.path.exists("/proc/self"), reason="needs /proc to have a read-only place"
)
def test_folder_that_cannot_be_written(capfd):
    status, _, err = generate(capfd, "/proc/self/out", "--num", 1)
    assert status == 1 and "cannot write" in err and err.count("\n") == 1


def refuse_the_third(monkeypatch, number):
    """The third file that is written ends half-way with this error of the system."""
    write, lock, count = Path.write_bytes, threading.Lock(), []

    def refusing(self, data):
        with lock:
            count.append(self)
            third = len(count) == 3
        if third:
            write(self, data[:20])
            raise OSError(number, os.strerror(number))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", refusing)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    "number, message",
    [(errno.ENOSPC, "the disk is full: free some space"), (errno.EROFS, "the file system is read-only")],
)
def test_failed_write_stops_the_run_and_leaves_nothing_half_written(
    tmp_path, capfd, monkeypatch, workers, number, message
):
    refuse_the_third(monkeypatch, number)
    status, out, err = generate(capfd, tmp_path, "--num", 200, "--batch", 5, "--workers", workers)
    last = err.splitlines()[-1]
    assert status == 1 and not out and last.startswith("sign-fast: error: cannot write") and message in last
    assert sum("error" in line for line in err.splitlines()) == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert 2 <= len(names) < 50  # far from all: the writers did not go on
    assert all(name.endswith(".png") and not name.startswith(".") for name in names)
    for name in names:
        Image.open(tmp_path / name).load()
    if workers == 1:
        assert names[:2] == ["000000.png", "000001.png"] and "000002.png" not in names


def test_folder_that_vanishes(tmp_path, capfd, monkeypatch):
    stream = ImageGenerator.stream

    def vanishing(self, *rest, **options):
        for i, array in enumerate(stream(self, *rest, **options)):
            if i == 2:
                (tmp_path / "out").rename(tmp_path / "elsewhere")
            yield array

    monkeypatch.setattr(ImageGenerator, "stream", vanishing)
    status, _, err = generate(capfd, tmp_path / "out", "--num", 20, "--batch", 2)
    assert status == 1 and "cannot write" in err.splitlines()[-1]
    assert not list((tmp_path / "elsewhere").glob(".*"))


def test_order_and_bytes_do_not_depend_on_the_workers(tmp_path, capfd):
    words = ["--seeds", "3,1,900-930", "--batch", 7, "--subdirs"]
    for workers in (1, 2, 7):
        status, out, _ = generate(capfd, tmp_path / str(workers), *words, "--workers", workers)
        assert status == 0 and "33 images" in out
    assert len(files(tmp_path / "1")) == 33
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "7")


def test_files_hold_what_the_generator_gives(tmp_path, capfd):
    generate(capfd, tmp_path, "--seeds", "0-9", "--batch", 4, "--workers", 3)
    generator = ImageGenerator.from_pretrained("digits-uncond", "cpu")
    for batch in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
        for seed, want in zip(batch, generator(batch, 3).numpy(), strict=True):
            assert (np.asarray(Image.open(tmp_path / f"{seed:06d}.png"))[:, :, None] == want).all()


def test_noise(tmp_path, capfd):
    for noise in ("torch", "philox"):
        assert generate(capfd, tmp_path / noise, "--num", 3, "--noise", noise)[0] == 0
    assert generate(capfd, tmp_path / "default", "--num", 3)[0] == 0
    torch_, philox = files(tmp_path / "torch"), files(tmp_path / "philox")
    assert torch_ == files(tmp_path / "default") and not set(torch_.values()) & set(philox.values())
    seeds = f"1,{(1 << 32) + 1}"  # one image of the published draws, two of the others
    assert "are one image" in generate(capfd, tmp_path / "a", "--seeds", seeds)[2]
    assert generate(capfd, tmp_path / "b", "--seeds", seeds, "--noise", "philox")[0] == 0
    assert len(set(files(tmp_path / "b").values())) == 2


class TimeFree(torch.nn.Module):
    img_resolution, img_channels, label_dim, time_free = 4, 3, 0, True

    def forward(self, x):
        return x.clamp(-1, 1) / 2


def test_student_without_time_input(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(ImageGenerator, "from_pretrained", lambda *rest: ImageGenerator(TimeFree()))
    assert generate(capfd, tmp_path / "a", "--num", 2)[0] == 0
    want = np.trunc(
        SeededNoise("cpu", [0]).randn([1, 3, 4, 4])[0].clamp(-1, 1).numpy() / 8 * 127.5 + 128
    )  # three steps
    picture = np.asarray(Image.open(tmp_path / "a" / "000000.png"))
    assert (picture == want.transpose(1, 2, 0)).all()
    for word, message in (("--sigma_G", "this one takes none"), ("--rho", "only a teacher's sampler takes --rho, and")):
        status, _, err = generate(capfd, tmp_path / "b", "--num", 2, word, 2)
        assert status == 1 and message in err and err.count("\n") == 1


def test_the_bar_counts_what_has_been_saved(tmp_path, capfd):
    generate(capfd, tmp_path, "--seeds", "1,5,6")
    status, _, err = generate(capfd, tmp_path, "--num", 10, "--batch", 4)
    assert status == 0 and "3/10" in err and "10/10" in err.splitlines()[-1]


def test_at_most_so_many_images_wait(tmp_path, capfd, monkeypatch):
    waiting, wanted = [], threading.Event()
    save, finish = PngWriter.save, PngWriter._finish_oldest

    def counting(self, path, image, note):
        save(self, path, image, note)
        waiting.append(len(self._jobs))

    def finishing(self):
        wanted.set()
        finish(self)

    monkeypatch.setattr(PngWriter, "save", counting)
    monkeypatch.setattr(PngWriter, "_finish_oldest", finishing)
    monkeypatch.setattr(pictures, "save_png", lambda path, image, note: wanted.wait())  # slower than any generator
    assert generate(capfd, tmp_path, "--num", 700, "--batch", 350, "--workers", 2)[0] == 0
    assert len(waiting) == 700 and max(waiting) == 256


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_interrupted_run_keeps_whole_files_and_goes_on(tmp_path, capfd, monkeypatch, batches):
    words = ["--num", 20, "--batch", 4, "--workers", 3]
    stream = ImageGenerator.stream

    def interrupted(self, *rest, **options):
        arrays = stream(self, *rest, **options)
        yield from itertools.islice(arrays, batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImageGenerator, "stream", interrupted)
        status, _, err = generate(capfd, tmp_path / "a", *words)
    assert status == 130 and "the same command goes on from there" in err.splitlines()[-1]
    kept = files(tmp_path / "a")
    assert len(kept) <= 4 * batches and len(kept) == len(list((tmp_path / "a").iterdir()))
    status, out, _ = generate(capfd, tmp_path / "a", *words)
    assert status == 0 and (not kept or f"({len(kept)} were there already)" in out)
    generate(capfd, tmp_path / "b", *words)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_control_c_leaves_only_whole_files(tmp_path):
    words = ["--network", "digits-uncond", "--device", "cpu", "--num", "100000", "--steps", "1", "--workers", "4"]
    command = [sys.executable, "-m", "sign_fast.cli", "generate", *words, "--outdir", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        while process.poll() is None and not (tmp_path / "000200.png").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("sign-fast: error: interrupted") and "Traceback" not in err
    left = list(tmp_path.iterdir())
    assert 200 <= len(left) < 100000 and all(path.suffix == ".png" for path in left)
    for path in left:
        Image.open(path).load()


def test_help_and_version(capfd):
    assert run(capfd, "--version")[1].startswith("sign-fast, version 0.")
    out = run(capfd, "generate", "--help")[1]
    for option in ("--sigma_G", "--S_churn", "--disc", "--subdirs", "--num", "--workers", "--noise"):
        assert option in out
    assert run(capfd, "nonsense")[0] == 2

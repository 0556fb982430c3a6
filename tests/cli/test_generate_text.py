"""`sign-fast generate` with a text-to-image pipeline's folder."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from sign_fast.cli.main import main
from sign_fast.integrations.diffusers import SiDPipeline
from tests.integrations.diffusers import tiny


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "sd15"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        SiDPipeline.from_pretrained(tiny.folder("sd15"), num_inference_steps=2).save_pretrained(folder)
    return folder


def generate(capfd, network, outdir, *words):
    """Exit status, standard output and standard error."""
    given = ["generate", "--network", network, "--outdir", outdir, "--device", "cpu", *words]
    try:
        main([str(word) for word in given])
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    return status, *capfd.readouterr()


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_one_prompt_and_several(student, tmp_path, capfd):
    pipe = SiDPipeline.from_pretrained(student)
    status, out, _ = generate(
        capfd, student, tmp_path / "a", "--prompt", "a cat", "--seeds", "3,5", "--grid", tmp_path / "grid.png"
    )
    assert status == 0 and "2 images" in out and (tmp_path / "grid.png").is_file()
    got = pictures(tmp_path / "a")
    want = pipe(["a cat"] * 2, seeds=[3, 5]).images
    assert list(got) == ["000003.png", "000005.png"]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(got.values(), want, strict=True))

    (tmp_path / "prompts.txt").write_text("a cat\nthe red dog\n" + "the dog " * 10 + "\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--steps", 1, "--batch", 2]
    status, out, err = generate(capfd, student, tmp_path / "b", *words)
    assert status == 0 and "3 images" in out and err.count("of which 16 are read") == 1
    (alone,) = pipe("the red dog", 1, seeds=1).images
    assert np.abs(pictures(tmp_path / "b")["000001.png"].astype(int) - np.asarray(alone)).max() <= 1
    status, out, _ = generate(capfd, student, tmp_path / "b", *words, "--num", 2)
    assert status == 0 and "2 images" in out and "2 were there already" in out
    status, _, err = generate(capfd, student, tmp_path / "b", "--prompt", "a cat", "--seeds", "1", "--steps", 1)
    assert status == 1 and "000001.png is there already, made with prompt 'the red dog', not 'a cat'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a text-to-image pipeline needs --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--prompts", "none.txt"], "--prompt and --prompts are one choice"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompt", " "], "--prompt is blank: give a text"),
        (["--prompt", "a", "--rho", "7", "--class", "1"], "--rho, --class do not go with a text-to-image pipeline"),
        (["--prompt", "a", "--noise", "philox"], "--noise philox does not go with"),
        (["--prompt", "a", "--steps", "900"], "num_inference_steps must be 1 to 625, not 900"),
    ],
)
def test_bad_options(student, tmp_path, capfd, words, message):
    status, _, err = generate(capfd, student, tmp_path / "out", *words)
    assert status == 1 and err.count("\n") == 1 and message in err and not (tmp_path / "out").exists()


def test_numbers_of_seeds_and_prompts(student, tmp_path, capfd):
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")
    status, _, err = generate(capfd, student, tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--seeds", "0-2")
    assert status == 1 and "2 prompts for 3 seeds: give one prompt, or one a seed" in err
    status, _, err = generate(capfd, "digits-uncond", tmp_path / "out", "--prompt", "three")
    assert status == 1 and "prompts go with a text-to-image pipeline's folder: digits-uncond is none" in err

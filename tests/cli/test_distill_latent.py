"""sign-fast distill --method sid-latent: a run from prompts to pictures, and everything that can be wrong."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_generate import run
from tests.distill.text_cases import PROMPTS, teacher, write_images, write_prompts

SHORT = ["--batch", 2, "--duration", 0.000004, "--log-every", 1, "--quality-every", 2, "--samples", 2, "--lr", 1e-4]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    write_prompts(folder / "prompts.txt")
    write_images(folder / "data", 3)
    return folder


def words_of(root, **others):
    """The command but for --outdir."""
    given = {"--teacher": teacher("sd15"), "--prompts": root / "prompts.txt", **others}
    pairs = [word for name, value in given.items() if value is not None for word in (name, value)]
    return ["distill", "--method", "sid-latent", *pairs]


def test_from_prompts_to_pictures(root, tmp_path, capfd):
    from sign_fast.integrations.diffusers import SiDPipeline

    words = [*words_of(root), *SHORT, "--steps", 2, "--guidance", "lsg", "--resolution", 32]
    words += ["--outdir", tmp_path / "run"]
    status, out, err = run(capfd, *words)
    assert status == 0, err
    assert out == f"distilled to 2 iterations: {tmp_path / 'run' / 'network'}\n"
    assert "no quality figure is measured" in err and "prompts: 100%" in err and "loss_fake=" in err
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    pipeline = SiDPipeline.from_pretrained(tmp_path / "run" / "network")
    assert pipeline.config.num_inference_steps == 2
    assert pipeline(PROMPTS[0], seeds=[3]).images[0].size == (32, 32)  # as trained; the teacher's are 64
    assert f"teacher: `{teacher('sd15')}`" in (tmp_path / "run" / "network" / "README.md").read_text()
    status, out, err = run(capfd, *words)  # once more: there is nothing to do
    assert status == 0 and out.startswith("distilled to 2 iterations")
    status, _, err = run(capfd, *words, "--lsg", 3, "--alpha", 1.2)
    assert status == 1 and "holds a run with another alpha, student_scale: repeat" in err


def test_dry_run_checks_everything_and_leaves_no_trace(root, tmp_path, capfd):
    more = ["--guidance", "anti-cfg", "--guidance-scale", -0.5, "--steps", 4, "--noise-type", "ddim", "--fake-lora", 4]
    more += ["--flow-weight", "1/omega", "--lsg-gan", 0.5, "--adversarial-after", 0.001, "--duration", 0.01]
    more += ["--resolution", 96, "--precision", "bf16", "--batch", 8, "--batch-gpu", 3, "--cache", tmp_path / "cache"]
    words = words_of(root, **{"--teacher": teacher("flow"), "--data": root / "data"})
    status, out, err = run(capfd, *words, *more, "--outdir", tmp_path / "run", "--dry-run")
    assert status == 0, err
    found = json.loads(out)
    want = {"method": "sid-latent", "guidance": "anti-cfg", "guidance_scale": -0.5, "steps": 4, "noise_type": "ddim"}
    want |= {"fake_lora": 4, "flow_weight": "1/omega", "adversarial_weight": 0.5, "adversarial_kimg": 1, "kimg": 10}
    want |= {"resolution": 96, "precision": "bf16", "accumulation": 4, "student_scale": 100, "alpha": 1.0}
    assert {name: found[name] for name in want} == want and found["iterations"] == 1250
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ({"--teacher": None}, [], "name a --teacher: the folder of a diffusers pipeline"),
        ({"--prompts": None}, [], "name a file of them with --prompts"),
        ({"--teacher": "digits-uncond"}, [], "digits-uncond is not there: name a pipeline's folder"),
        ({"--prompts": "nowhere.txt"}, [], "nowhere.txt is not there"),
        ({}, ["--guidance", "anti-cfg"], "anti-cfg needs a negative scale, such as -0.5, not None (--guidance-scale)"),
        ({}, ["--guidance-scale", -1], "--guidance-scale goes with --guidance anti-cfg: leave it away"),
        ({}, ["--noise-type", "ddim"], "--noise-type goes with --steps above 1"),
        ({}, ["--lsg-gan", 1], "--lsg-gan goes with --data: leave it away"),
        ({}, ["--student-after", 1], "--student-after goes with --data"),
        ({}, ["--flow-weight", "1/omega"], "--flow-weight is of flows"),
        ({}, ["--tmax", 500], "--tmax goes with --method sid, not with sid-latent: leave it away"),
        ({}, ["--rec", 1], "--rec goes with --method sign, not with sid-latent"),
        ({}, ["--xflip"], "--xflip goes with --method sida, not with sid-latent"),
        ({}, ["--update", "combined"], "--update goes with --method sid, not with sid-latent"),
        ({}, ["--cuda-graph"], "--cuda-graph goes with --method sid, not with sid-latent"),
        ({}, ["--reg", 1], "--reg goes with --method sid, not with sid-latent"),
        ({}, ["--dropout", 0.1], "--dropout goes with --method sid, not with sid-latent"),
        ({}, ["--steps", 0], "steps must be at least 1"),
        ({}, ["--resolution", 50], "resolution must be a multiple of 16"),
        ({}, ["--prompt-column", "words"], "has no columns: leave --prompt-column away"),
        ({"--data": "digits"}, [], "digits is not there: name a folder of images with captions"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(root, tmp_path, capfd, given, more, message):
    status, _, err = run(capfd, *words_of(root, **given), *more, "--outdir", tmp_path / "run")
    assert status != 0 and message in err, err
    assert err.rstrip("\n").count("\n") == 0 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--prompts", "--guidance", "--fake-lora", "--resolution", "--cache", "--samples"])
def test_other_methods_refuse_its_options(tmp_path, capfd, option):
    value = {"--prompts": "p", "--guidance": "lsg", "--cache": "c"}.get(option, 8)
    status, _, err = run(capfd, "distill", "--recipe", "digits-sid", option, value, "--outdir", tmp_path / "run")
    assert status == 1 and f"{option} goes with --method sid-latent, not with sid: leave it away" in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()

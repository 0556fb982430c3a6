"""A text-to-image run: what it writes, exact resume, also after kill -9, when it stops, what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sign_fast.distill.run_settings import plain
from sign_fast.distill.text_to_image import trainer
from sign_fast.distill.text_to_image.inputs import TextSource
from sign_fast.distill.text_to_image.monitor import loss_columns, spread
from sign_fast.distill.text_to_image.networks import build_latent_networks
from sign_fast.distill.text_to_image.settings import check_text_settings
from sign_fast.distill.text_to_image.trainer import TextDistiller
from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers.loading import load_parts
from tests.distill import text_cases as cases
from tests.distill.text_cases import CPU, ITERATIONS, PROMPTS, settings, write_images, write_prompts
from tests.golden_rules import normal
from tests.integrations.diffusers import tiny

LSG = {"steps": 2, "guidance": "lsg"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    cases.leave_away_what_takes_long(monkeypatch.setattr)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """prompts.txt and data/, and the embeddings that runs share."""
    folder = tmp_path_factory.mktemp("text")
    write_prompts(folder / "prompts.txt")
    write_images(folder / "data")
    return folder


def some(root, kind="sd15", **changes):
    return settings(cases.teacher(kind), str(root / "prompts.txt"), **{"cache": str(root / "cache"), **changes})


@pytest.fixture(scope="module")
def finished(root):
    """Of few-step SiD with guidance; its cache is its own."""
    with pytest.MonkeyPatch.context() as patch:  # set up before `short` is
        cases.leave_away_what_takes_long(patch.setattr)
        TextDistiller(some(root, cache=None, **LSG), root / "finished", CPU).run()
    return root / "finished"


def rows(folder, table="metrics"):
    with (folder / f"{table}.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def state(folder, iteration=ITERATIONS):
    return torch.load(folder / f"state-{iteration:08d}.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_run(a, b):
    """Bit for bit: weights, average, optimizers, guard, rows and the pipeline."""
    first, second = state(a), state(b)
    for settings_ in (first["settings"], second["settings"]):
        del settings_["cache"]
    assert equal(first, second)
    assert rows(a) == rows(b) and rows(a, "quality") == rows(b, "quality")
    found, want = files(a / "network"), files(b / "network")
    assert found.keys() == want.keys()
    assert all(found[name] == want[name] for name in found if name != "README.md")


# ---- what it writes ----


def test_a_run_writes_what_it_promises(finished):
    assert [row["iteration"] for row in rows(finished)] == [str(i) for i in range(1, ITERATIONS + 1)]
    assert [row["iteration"] for row in rows(finished, "quality")] == ["3", "5"]
    assert sorted(p.name for p in finished.glob("state-*")) == ["state-00000004.pt", "state-00000005.pt"]
    assert sorted(p.name for p in finished.glob("samples-*")) == ["samples-00000003.png", "samples-00000005.png"]
    assert all(
        math.isfinite(float(v)) for t in ("metrics", "quality") for row in rows(finished, t) for v in row.values()
    )
    said = json.loads((finished / "settings.json").read_text())
    assert (said["resolution"], said["student_scale"], said["guidance"]) == (64, 1, "lsg")
    assert not [p for p in finished.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    with Image.open(finished / "samples-00000005.png") as picture:
        assert picture.mode == "RGB" and picture.size[0] >= 2 * 64


def test_the_result_is_a_pipeline_that_draws_what_was_logged(finished):
    from sign_fast.integrations.diffusers import SiDPipeline

    pipeline = SiDPipeline.from_pretrained(finished / "network")
    assert pipeline.config.num_inference_steps == 2 and pipeline.config.noise_type == "fresh"
    averaged = state(finished)["updates"]["ema"]
    assert equal({f"unet.{name}": p for name, p in pipeline.unet.state_dict().items()}, averaged)
    teacher = load_parts(cases.teacher("sd15"))
    for name in ("vae", "text_encoder"):
        assert equal(getattr(pipeline, name).state_dict(), getattr(teacher, name).state_dict())
    assert not equal(pipeline.unet.state_dict(), teacher.unet.state_dict())
    # no file is the teacher's own: some versions of safetensors write into files that are there
    assert {p.stat().st_nlink for p in (finished / "network").rglob("*") if p.is_file()} == {1}
    images = pipeline(["a cat", "a dog"], seeds=[1, 2]).images
    assert len(images) == 2 and images[0].size == (64, 64)
    card = (finished / "network" / "README.md").read_text()
    assert "guidance: `lsg, κ1 2, κ2 = κ3 2, κ4 2`" in card and "num_inference_steps=2" in card
    with pytest.raises(SignFastError, match="is a student: name the pipeline that it was distilled from"):
        TextDistiller(settings(finished / "network", str(finished.parent / "prompts.txt")), None, CPU)


def test_the_logged_deviation_is_of_the_saved_student(finished, root):
    again = TextDistiller(some(root, cache=None, **LSG), finished, CPU)
    again._prepare()
    latents = again.probe.samples()
    again.close()
    assert float(rows(finished, "quality")[-1]["latents_std"]) == pytest.approx(float(latents.double().std()), rel=1e-5)
    from sign_fast.integrations.diffusers import SiDPipeline

    pipeline = SiDPipeline.from_pretrained(finished / "network")
    draws = again.probe.draws
    noise = [draws.normal(stream, again.shape) for stream in (4, 128 + 1)]  # the student's latent and its first renoise
    from sign_fast.sampling import few_step_latent

    text = again.probe.text

    def predict(x, t):
        return pipeline.unet(x, t, encoder_hidden_states=text.states).sample

    want = few_step_latent(predict, noise[0], lambda x: noise[1], 2)
    assert float((latents - want).abs().max()) <= 2e-5 * float(want.abs().max())


def test_states_hold_the_networks_and_nothing_else(finished):
    found = state(finished)
    assert found.keys() == {"kind", "settings", "teacher", "prompts", "iteration", "updates", "guard"}
    assert found["updates"].keys() == {"fake", "student", "ema"}
    unet = load_parts(cases.teacher("sd15")).unet
    for net in (found["updates"]["fake"]["net"], found["updates"]["student"]["net"], found["updates"]["ema"]):
        assert net.keys() == {f"unet.{name}" for name in unet.state_dict()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd2-v", {}),
        ("flow", {"data": "data", "fake_updates": 2}),
        ("sdxl", {"data": "data", "adversarial_kimg": 0.004}),
    ],
    ids=["v", "flow", "sdxl"],
)
def test_every_loss_has_its_column(root, kind, changes):
    changes = {name: str(root / value) if name == "data" else value for name, value in changes.items()}
    run = TextDistiller(some(root, kind, **changes), None, CPU)
    losses = [run.step() for _ in range(2)]
    assert {name for found in losses for name in found} == set(loss_columns(run.settings))
    assert all(torch.isfinite(value) for found in losses for value in found.values())
    assert ("loss_adversarial" in losses[0]) == (kind == "flow") and run.settings.student_scale == (
        100 if kind == "flow" else 1
    )


# ---- does it learn ----


def test_the_fake_score_learns_what_the_student_makes(root):
    """Over twenty iterations of fresh draws, while the student moves."""
    run = TextDistiller(some(root, lr=1e-5, fake_lr=3e-3, kimg=0.2), None, CPU)
    losses = [float(run.step()["loss_fake"]) for _ in range(20)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("kind", ["sd2-v", "flow"])
def test_both_losses_fall_on_draws_that_stay(root, kind):
    """One network at a time: each step is against the gradient of what is logged."""
    s = some(root, kind, betas=(0.5, 0.9))
    for name, other, changes in [("loss_fake", "loss_student", {}), ("loss_student", "loss_fake", {"guidance": "lsg"})]:
        rates = {"lr": 1e-30, "fake_lr": 3e-3} if name == "loss_fake" else {"lr": 1e-3, "fake_lr": 1e-30}
        run = TextDistiller(dataclasses.replace(s, **rates, **changes), None, CPU)
        fake = run.updates.networks.fake
        with torch.no_grad():
            for i, p in enumerate(fake.parameters()):
                p.add_(0.1 * p.std() * normal(i, *p.shape) if p.numel() > 1 else 0)
        share = run.inputs.at(0)
        found = [run.updates.run(0, share) for _ in range(6)]
        losses, still = ([float(f[key]) for f in found] for key in (name, other))
        assert losses[-1] < losses[0] - 0.02 * abs(losses[0]), name
        if name == "loss_student":
            assert still[0] != still[-1]  # the fake score sees what the student makes now
            assert sorted(losses, reverse=True)[:2] == losses[:2]


# ---- how it is computed ----


def build(kind, **changes):
    parts = load_parts(cases.teacher(kind))
    return parts, build_latent_networks(parts, settings("", "p", **changes), CPU)


def inputs(kind, rows_=3):
    generator = torch.Generator().manual_seed(1)
    text = {"states": torch.randn(rows_, tiny.TOKENS, 32 if kind == "sdxl" else 16, generator=generator)}
    if kind == "sdxl":
        text |= {"pooled": torch.randn(rows_, 12, generator=generator), "time_ids": torch.full((rows_, 6), 64.0)}
    from sign_fast.sampling.text import TextConditioning

    return torch.randn(rows_, 4, 8, 8, generator=generator), torch.tensor([50, 400, 900]), TextConditioning.of(text)


def test_adapters_are_on_the_teachers_own_weights():
    _, nets = build("sdxl", fake_lora=2)
    teacher = {p.data_ptr() for p in nets.teacher.parameters()}
    own = [(name, p) for name, p in nets.fake.named_parameters() if p.data_ptr() not in teacher]
    assert own and all("lora_" in name for name, _ in own)
    assert len(list(nets.fake.parameters())) == len(own) + len(list(nets.teacher.parameters()))
    given = inputs("sdxl")
    with torch.no_grad():
        assert torch.equal(nets.fake(*given), nets.teacher(*given))  # where it starts
        for _, p in own:
            p.add_(0.1)
        assert not torch.equal(nets.fake(*given), nets.teacher(*given))
    again = build("sdxl", fake_lora=2)[1]
    firsts = [[p for name, p in n.fake.named_parameters() if "lora_A" in name] for n in (nets, again)]
    assert all(torch.allclose(a - 0.1, b, atol=1e-6) for a, b in zip(*firsts, strict=True))  # drawn from the seed
    nets.fake(*given).sum().backward()
    assert [p.grad.stride() for _, p in own] == [p.stride() for _, p in own]  # which DDP copies and warns of otherwise


def test_a_run_with_adapters_keeps_only_them_and_the_teacher_stays(root, tmp_path):
    run = TextDistiller(some(root, fake_lora=2, kimg=0.008, lr=1e-2, **LSG), tmp_path, CPU)
    teacher = run.updates.networks.teacher
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    run.run()
    assert equal(dict(teacher.state_dict()), before)
    kept = state(tmp_path, 2)["updates"]["fake"]["net"]
    assert kept and all("lora_" in name for name in kept)
    assert any(p.any() for name, p in kept.items() if "lora_B" in name)


def test_sixteen_bits_are_over_float32_weights():
    _, low = build("sdxl", precision="bf16")
    full = build("sdxl")[1]
    for net in (low.fake, low.student, low.ema):
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    kinds = {type(m).__name__: m.weight.dtype for m in low.teacher.modules() if getattr(m, "weight", None) is not None}
    assert kinds["Conv2d"] == kinds["Linear"] == torch.bfloat16 and kinds["GroupNorm"] == torch.float32
    given = inputs("sdxl")
    with torch.no_grad():
        teacher, student, want = low.teacher(*given), low.student(*given), full.teacher(*given)
    assert torch.equal(teacher, student) and teacher.dtype == torch.float32  # casting once is casting in every call
    error = float((teacher - want).abs().max() / want.abs().max())
    assert 1e-5 < error < 0.05
    low.student(*given).square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in low.student.parameters())


def test_checkpointing_changes_nothing(root):
    found = []
    for changes in ({}, {"checkpointing": True}):
        run = TextDistiller(some(root, fake_lora=2, **LSG, **changes), None, CPU)
        found.append([{name: float(v) for name, v in run.step().items()} for _ in range(2)])
    for plain_, recomputed in zip(*found, strict=True):
        assert recomputed == pytest.approx(plain_, rel=1e-5)


def test_accelerated_networks_are_the_same_run(root):
    found = []
    for changes in ({}, {"accelerate": True}):
        run = TextDistiller(some(root, "sdxl", data=str(root / "data"), fake_lora=2, **changes), None, CPU)
        found.append([{name: float(v) for name, v in run.step().items()} for _ in range(2)])
        kinds = {type(m).__module__ for m in run.updates.networks.student.modules()}
        assert any("sign_fast.integrations" in kind for kind in kinds) == bool(changes)
    for plain_, accelerated in zip(*found, strict=True):
        assert accelerated == pytest.approx(plain_, rel=1e-3, abs=1e-3)


def test_accelerated_networks_are_as_exact_in_sixteen_bits():
    """Outputs and gradients are at most twice as far from float32's as without it."""
    given, errors = inputs("sdxl"), []
    results = []
    for changes in ({}, {"precision": "bf16"}, {"precision": "bf16", "accelerate": True}):
        net = build("sdxl", **changes)[1].student
        output = net(*given)
        output.square().sum().backward()
        results.append([output.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])])
    for low in results[1:]:
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(low, results[0], strict=True)])
    assert all(0 < accelerated <= 2 * plain_ for plain_, accelerated in zip(*errors, strict=True)), errors


def test_a_batch_in_parts_is_the_whole(root):
    found = []
    for parts in (1, 4):
        s = some(root, data=str(root / "data"), accumulation=parts, lr=1e-30, betas=(0.5, 0.99), eps=1e-4, **LSG)
        run = TextDistiller(s, None, CPU)
        found.append([{name: float(v) for name, v in run.step().items()}])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


# ---- resuming ----


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd15", {"fake_lora": 2, "guidance": "zero-cfg", "accumulation": 2}),
        ("flow", {"data": "data", "fake_updates": 2, "steps": 3}),
    ],
    ids=["lora", "flow"],
)
def test_resume_is_exact(root, tmp_path, kind, changes):
    changes = {name: str(root / value) if name == "data" else value for name, value in changes.items()}
    s = some(root, kind, lr_schedule="cosine", quality_every=4, samples=1, **changes)

    def stop(progress):
        if progress.iteration == 3:
            raise Stopped

    TextDistiller(s, tmp_path / "whole", CPU).run()
    with pytest.raises(Stopped):
        TextDistiller(s, tmp_path / "cut", CPU).run(stop)
    again = TextDistiller(s, tmp_path / "cut", CPU)
    assert again.iteration == 2
    again.run()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_kill_dash_nine_and_again(finished, root, tmp_path):
    words = [sys.executable, cases.__file__, "killed", str(cases.teacher("sd15")), str(root / "prompts.txt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cases.__file__).parents[2])}
    done = subprocess.run([*words, str(tmp_path / "run")], capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = TextDistiller(some(root, cache=None, **LSG), tmp_path / "run", CPU)
        assert again.iteration == 2
        again.run()
        if threads != 1:  # sums in the order of one thread
            TextDistiller(some(root, cache=None, **LSG), tmp_path / "one", CPU).run()
    finally:
        torch.set_num_threads(threads)
    assert_same_run(tmp_path / "run", tmp_path / "one" if threads != 1 else finished)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_prompts_in_a_table_are_the_same_run(finished, root, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(PROMPTS))), "words": PROMPTS})
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet")
    s = some(root, cache=None, **LSG)
    s = dataclasses.replace(s, prompts=str(tmp_path / "prompts.parquet"), prompt_column="words")
    run = TextDistiller(s, None, CPU)
    run.settings = dataclasses.replace(run.settings, cache=str(finished / "cache"))
    before = files(finished / "cache")
    losses = {name: float(v) for name, v in run.step().items()}
    row = rows(finished)[0]
    assert losses == pytest.approx({name: float(row[name]) for name in losses}, rel=1e-5)
    assert files(finished / "cache").keys() == before.keys()  # nothing is encoded twice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "another lr: repeat its settings"),
        ({"precision": "bf16"}, "another precision: repeat its settings"),
        ({"guidance": "none", "noise_type": "ddim"}, "another guidance, noise_type: repeat"),
        ({"prompts": "OTHER"}, r"run from another prompts than .*other.txt"),
        ({"teacher": "OTHER"}, r"run from another teacher than .*other"),
        ({"method": "sid", "of": "sid"}, "is not a distillation|another method"),
    ],
    ids=["lr", "precision", "guidance", "prompts", "teacher", "method"],
)
def test_another_run_is_refused_and_nothing_is_lost(finished, root, tmp_path, changes, message):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    if changes.pop("of", None):
        from sign_fast.distill.trainer import Distiller
        from tests import tiny_runs

        with pytest.raises(SignFastError, match=message):
            Distiller(tiny_runs.settings("digits-uncond"), finished, CPU)
    else:
        if "prompts" in changes:
            changes = {"prompts": write_prompts(tmp_path / "other.txt", [*PROMPTS, "one more"])}
        if "teacher" in changes:
            other = shutil.copytree(cases.teacher("sd15"), tmp_path / "other")
            weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
            next(iter(weights.values())).mul_(1.5)
            save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            changes = {"teacher": str(other)}
        with pytest.raises(SignFastError, match=message):
            TextDistiller(dataclasses.replace(some(root, cache=None, **LSG), **changes), finished, CPU)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_folder_that_has_moved_and_what_may_change_are_not_another_run(finished, root, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    elsewhere = shutil.copytree(cases.teacher("sd15"), tmp_path / "moved")
    s = dataclasses.replace(some(root, keep=3, samples=3, **LSG), teacher=str(elsewhere), kimg=0.024)
    run = TextDistiller(s, folder, CPU)
    assert run.iteration == ITERATIONS
    run.close()


# ---- when it stops ----


def test_latents_that_go_astray_stop_the_run(root, tmp_path, monkeypatch):
    deviations = iter([1.0, 2.0, 30.0, 40.0, 50.0])
    monkeypatch.setattr(trainer, "deviation", lambda latents: 2.0)
    monkeypatch.setattr("sign_fast.distill.text_to_image.monitor.deviation", lambda latents: next(deviations))
    s = some(root, quality_every=1, stop_factor=10, kimg=0.04, save_every=3)
    with pytest.raises(SignFastError, match=r"diverges: the latents' distance .* 25 at iteration 5, .*keeps the last"):
        TextDistiller(s, tmp_path, CPU).run()
    assert (tmp_path / "network" / "model_index.json").exists()


def test_the_distance_of_deviations():
    assert spread(2.0, 1.0) == spread(0.5, 1.0) == 2 and spread(1.0, 1.0) == 1
    assert spread(0.0, 1.0) == spread(math.nan, 1.0) == spread(math.inf, 1.0) == math.inf


def test_weights_that_are_not_finite_stop_the_run(root, tmp_path):
    s = some(root, lr=1e38, save_every=1, quality_every=1)
    with pytest.raises(SignFastError, match=r"(not finite|is inf|is nan) at iteration \d.*lower the learning rate"):
        TextDistiller(s, tmp_path, CPU).run()


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ""}, "name a file of them with --prompts"),
        ({"guidance": "anti-cfg"}, "anti-cfg needs a negative scale, such as -0.5, not None .--guidance-scale"),
        ({"guidance": "anti-cfg", "guidance_scale": 2.0}, "needs a negative scale"),
        ({"guidance": "lsg", "guidance_scale": -1.0}, "the scales of lsg are fixed"),
        ({"guidance": "cfg"}, "guidance must be none or lsg"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 626}, "steps must be at most 625"),
        ({"noise_type": "old"}, "noise_type must be fresh or fixed or ddim"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"alpha": 3.0}, "alpha must be between"),
        ({"fake_lora": -1}, "fake_lora must be a number at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"student_scale": 0.0}, "student_scale must be a number above 0"),
        ({"data": "d", "student_kimg": 9.0}, "before the student starts to move"),
    ],
    ids=str,
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(SignFastError, match=message):
        check_text_settings(dataclasses.replace(settings("T", "p"), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 60}, "resolution must be a multiple of 16 from 16 .*, not 60: change --resolution"),
        ({"resolution": 100_000}, "resolution must be a multiple of 16"),
        ({"flow_weight": "1/omega"}, "--flow-weight is of flows, and .* predicts epsilon: leave it away"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt is not there"),
        ({"prompt_column": "words"}, "has no columns: leave --prompt-column away"),
        ({"data": "nowhere"}, "nowhere is not there: name a folder of images with captions"),
        ({"teacher": "nowhere"}, "nowhere is not there: name a pipeline's folder"),
        ({"batch": 5, "accumulation": 2}, "a batch of 5 does not divide into 1 processes × 2 parts"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_written(root, tmp_path, changes, message):
    with pytest.raises(SignFastError, match=message):
        TextDistiller(dataclasses.replace(some(root), **changes), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def broken(tmp_path, change):
    folder = shutil.copytree(cases.teacher("sd15"), tmp_path / "teacher")
    change(folder)
    return folder


def edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def spoil_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
            "prediction_type 'sample'",
        ),
        (lambda f: edit(f / "vae" / "config.json", scaling_factor=0), "scaling_factor must be a number above 0"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder is missing"),
        (lambda f: edit(f / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"]), "not supported"),
        (spoil_weights, "weights that are not finite"),
    ],
    ids=["prediction", "scale", "missing", "part", "nan"],
)
def test_broken_teachers_are_one_line(root, tmp_path, change, message):
    teacher = broken(tmp_path, change)
    with pytest.raises(SignFastError, match=message) as caught:
        TextDistiller(dataclasses.replace(some(root), teacher=str(teacher)), tmp_path / "run", CPU)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_counted_and_cut(root, tmp_path, monkeypatch):
    monkeypatch.setattr("sign_fast.integrations.diffusers.prompts._CHECKED", 2)  # over several parts
    long = "a cat " * 20
    prompts = write_prompts(tmp_path / "prompts.txt", ["a cat", long, long + "dog"])
    with pytest.warns(
        UserWarning, match=r"\(and 1 more\) has \d+ tokens, of which 16 are read: its end is cut"
    ) as caught:
        run = TextDistiller(dataclasses.replace(some(root), prompts=prompts), None, CPU)
        run.step()
    assert len([w for w in caught if "tokens" in str(w.message)]) == 1
    text = run.inputs.text.at([1, 2])
    assert torch.equal(text.states[0], text.states[1])  # what differs is cut


def test_a_run_goes_on_with_another_version_of_transformers(root):
    s, parts = some(root), load_parts(cases.teacher("sd15"))
    before = TextSource(parts, s, 64)
    parts.text_encoder.config.transformers_version = "4.0"
    after = TextSource(parts, s, 64)
    assert after.facts == before.facts and after.key(PROMPTS) == before.key(PROMPTS)
    assert after.key(PROMPTS) != after.key(PROMPTS[1:])
    assert TextSource(parts, some(root, precision="bf16"), 64).key(PROMPTS) != after.key(PROMPTS)
    parts.text_encoder.config.layer_norm_eps = 1e-3
    assert TextSource(parts, s, 64).facts != before.facts


def test_what_a_killed_process_left_in_the_cache_is_removed_but_not_in_a_shared_one(root, tmp_path):
    left = []
    for cache in (tmp_path / "run" / "cache", tmp_path / "shared"):
        (cache / "text-0").mkdir(parents=True)
        left.append(cache / "text-0" / ".rows-00000.safetensors.abcd1234.tmp")
        left[-1].write_bytes(b"half")
    for cache in (None, str(tmp_path / "shared")):
        run = TextDistiller(some(root, cache=cache), tmp_path / "run", CPU)
        assert len(run.inputs.text) == len(PROMPTS)
        run.close()
    assert [path.exists() for path in left] == [False, True]


def test_a_teacher_that_has_gone_is_named(root, tmp_path):
    teacher = shutil.copytree(cases.teacher("sd15"), tmp_path / "teacher")
    run = TextDistiller(dataclasses.replace(some(root), teacher=str(teacher)), tmp_path / "run", CPU)
    shutil.rmtree(teacher)
    with pytest.raises(SignFastError, match=r"cannot read .*model_index.json any more .* put the teacher back"):
        run.save()
    run.close()


def test_a_teacher_without_a_middle_block_has_no_discriminator(root, tmp_path):
    teacher = shutil.copytree(cases.teacher("sd15"), tmp_path / "teacher")
    unet = load_parts(teacher).unet
    shutil.rmtree(teacher / "unet")
    type(unet).from_config({**unet.config, "mid_block_type": None}).save_pretrained(teacher / "unet")
    s = dataclasses.replace(some(root), teacher=str(teacher))
    TextDistiller(s, None, CPU)
    with pytest.raises(SignFastError, match=r"has no middle block, .* leave --data away"):
        TextDistiller(dataclasses.replace(s, data=str(root / "data")), None, CPU)


def test_without_a_folder_embeddings_need_one(root):
    run = TextDistiller(some(root, cache=None), None, CPU)
    with pytest.raises(SignFastError, match="name a --cache"):
        run.step()


def test_settings_on_disk_are_those_of_the_command(root):
    s = some(root)
    assert plain(s)["betas"] == [0.0, 0.999] and plain(s)["student_scale"] is None

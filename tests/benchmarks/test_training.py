"""Training's benchmark: equal mathematics on both sides, the passes of an iteration, what it writes. No times here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ledger as book
from benchmarks import training_providers as providers
from benchmarks.ledger_table import rewritten
from benchmarks.measure import take_turns
from benchmarks.plain_distill import PlainSiD
from benchmarks.training import main, training
from benchmarks.training_check import check, checked_batch, draws_of, move_apart
from benchmarks.training_comparison import begun
from benchmarks.training_providers import TrainingCase, counted, make, teacher_of
from sign_fast import models
from sign_fast.checkpoints.store import save_network
from sign_fast.distill.settings import DistillSettings
from sign_fast.distill.trainer import Distiller
from tests.golden_rules import GRADIENT_TOLERANCE, fill

ROOT = Path(__file__).parents[2]
SMALL = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
}
TEACHERS = {
    "song": ("EDMPrecond", {**SMALL, "label_dim": 0, "model_type": "SongUNet"}),
    "dhariwal": ("VPPrecond", {**SMALL, "label_dim": 3, "model_type": "DhariwalUNet", "model_channels": 64}),
}


def save_small(folder, key):
    """A small filled network's folder."""
    cls, kwargs = TEACHERS[key]
    net = fill(getattr(models, cls)(**kwargs), 5)
    save_network(folder, net.state_dict(), cls, kwargs, role="teacher")
    return str(folder)


@pytest.fixture(params=TEACHERS)
def teacher(request, tmp_path):
    return save_small(tmp_path / "teacher", request.param)


@pytest.fixture
def small(tmp_path):
    return save_small(tmp_path / "teacher", "song")


def test_the_trainer_gives_the_plain_loop_s_weights(teacher):
    """Two iterations from equal weights and draws: every network moves as far, and to the same place.

    With Adam's usual eps a gradient of nothing but rounding moves a weight by lr, whichever its sign; with a large eps
    the update is a smooth function of the gradient, and summation error stays what it is.
    """
    case = TrainingCase(teacher, 5, seed=3)
    adam = {"lr": 1e-2, "eps": 10.0}
    plain = PlainSiD(models.load(teacher), case.batch, **adam)
    settings = DistillSettings("sid", teacher, batch=case.batch, seed=case.seed, **adam)
    trainer = Distiller(settings, None, torch.device("cpu"))
    nets = trainer.networks
    sides = [(plain.fake.net, nets.fake), (plain.student.net, nets.student), (plain.ema.net, nets.ema)]
    move_apart([plain.fake.net, nets.fake], 1)
    begin = [{name: p.detach().clone() for name, p in net.named_parameters()} for _, net in sides]
    net = nets.teacher
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    for i in range(2):
        fake, student = plain.iteration(*draws_of(case, i, shape, net.label_dim))
        found = trainer.step()
        assert float(found["loss_fake"]) == pytest.approx(float(fake), rel=GRADIENT_TOLERANCE)
        want = float(student) / settings.student_scale
        assert float(found["loss_student"]) == pytest.approx(want, rel=GRADIENT_TOLERANCE)
    for role, start, (one, other) in zip(("fake", "student", "ema"), begin, sides, strict=True):
        others = dict(other.named_parameters())
        moved = {name: (p - start[name]).abs().max() for name, p in one.named_parameters()}
        furthest = max(moved.values())
        assert furthest > 1e-3, role
        for name, p in one.named_parameters():
            error = (p - others[name]).abs().max()
            rounding = 2 * torch.finfo(torch.float32).eps * start[name].abs().max()  # of the weight that is moved
            assert error <= GRADIENT_TOLERANCE * furthest + rounding, f"{role}: {name}: {error:.1e} of {furthest:.1e}"


def test_passes_of_an_iteration(teacher):
    found = {}
    for name in ("plain", "sign_fast", "sign_fast_combined"):
        provider = make(name, TrainingCase(teacher, 2))
        for _ in range(2):
            with counted(provider.networks) as passes:
                provider()
            found.setdefault(name, []).append((passes.forward, passes.to_inputs, passes.to_weights, passes.total))
        before = passes.total
        provider()
        assert passes.total == before  # the hooks are gone
    assert found == {
        "plain": [(5, 4, 2, 11)] * 2,
        "sign_fast": [(5, 4, 2, 11)] * 2,
        "sign_fast_combined": [(3, 4, 2, 9)] * 2,
    }


def test_passes_are_what_arithmetic_says(teacher):
    loop = PlainSiD(models.load(teacher), 2)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        loop.images(loop.draw(uniform=False))
    with FlopCounterMode(display=False) as all_of_them:
        loop.iteration()
    # nearly: the first convolution of a network needs no gradient for its input where only weights are trained
    assert 10.8 < all_of_them.get_total_flops() / one.get_total_flops() < 11.1


def spoil_gradients(monkeypatch, role, spoilt, of=lambda name: "conv" in name and name.endswith("weight")):
    """The trainer's network of that role gets spoilt(gradient, batch) for some weights, the convolutions'."""
    build = providers.LibraryTraining.__init__

    def begin(self, name, case):
        build(self, name, case)
        for name, p in getattr(self.trainer.networks, role).named_parameters():
            if of(name):
                p.register_hook(lambda grad: spoilt(grad, case.batch))

    monkeypatch.setattr(providers.LibraryTraining, "__init__", begin)


MUTANTS = {
    "no weight gradients of convolutions from 8 images on": lambda m: spoil_gradients(
        m, "fake", lambda grad, batch: grad * (batch < 8)
    ),
    "the student's convolutions go the other way": lambda m: spoil_gradients(m, "student", lambda grad, batch: -grad),
    "no average": lambda m: m.setattr("sign_fast.distill.iteration.average_weights", lambda *arguments: None),
    "an average without past": lambda m: m.setattr("sign_fast.distill.iteration.ema_beta", lambda *arguments: 0.0),
    "the combined update leaves the student as it is": lambda m: m.setattr(
        "sign_fast.distill.sid.student_backward", lambda student, images, seed, terms: images.backward(0 * seed)
    ),
    "the combined update has no ratio of levels": lambda m: m.setattr(
        "sign_fast.distill.sid.level_ratio", lambda sigma, settings: torch.ones_like(sigma)
    ),
    "one bias of the student learns half as fast": lambda m: spoil_gradients(
        m, "student", lambda grad, batch: grad / 2, lambda name: name.endswith("8x8_block0.conv1.bias")
    ),
    "the student's levels end at 60": lambda m: m.setattr("sign_fast.distill.levels.GRID_MAX", 60.0),
}
FOUND = {  # by which provider, and in what
    "no weight gradients of convolutions from 8 images on": ("sign_fast", "loss_student is off by"),
    "the student's convolutions go the other way": ("sign_fast", " of the student"),
    "no average": ("sign_fast", " of the average"),
    "an average without past": ("sign_fast", " of the average"),
    "the combined update leaves the student as it is": ("sign_fast_combined", " of the student"),
    "the combined update has no ratio of levels": ("sign_fast_combined", "loss_fake is off by"),
    "one bias of the student learns half as fast": ("sign_fast", "8x8_block0.conv1.bias"),
    "the student's levels end at 60": ("sign_fast", "loss_student is off by"),
}


def test_iterations_as_they_are_pass(teacher):
    assert check(TrainingCase(teacher, 128)) == ""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_an_iteration_that_is_another_is_found(mutant, small, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    found = check(TrainingCase(small, 128))
    name, what = FOUND[mutant]
    assert found.startswith(f"{name}: ") and what in found


def test_what_is_compared_on_a_cpu_is_no_longer_than_what_is_timed():
    sizes = {
        (device, side): checked_batch(TrainingCase("", 128, device=device), side)
        for device in ("cpu", "cuda")
        for side in (8, 32, 64)
    }
    assert sizes == {("cpu", 8): 32, ("cpu", 32): 4, ("cpu", 64): 4} | {("cuda", side): 32 for side in (8, 32, 64)}
    assert checked_batch(TrainingCase("", 2), 8) == 2


def test_what_is_compiled_is_whole_networks_once(tmp_path, monkeypatch):
    """Three graphs: the student without gradient, trained networks, teacher and fake score in the student's step."""
    cls, kwargs = TEACHERS["song"]
    save_network(tmp_path / "teacher", fill(getattr(models, cls)(**kwargs), 5).state_dict(), cls, kwargs)
    case = TrainingCase(str(tmp_path / "teacher"), 2)
    monkeypatch.setattr(providers.CompiledTraining, "backend", "eager")
    torch._dynamo.utils.counters.clear()
    compiled = make("compile", case)
    found = [compiled.iteration() for _ in range(2)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **options: None)
    plainly = make("compile", case)
    assert found == [plainly.iteration() for _ in range(2)]
    torch._dynamo.reset()


def test_a_preset_without_weights_gets_seeded_ones(tmp_path, monkeypatch):
    assert teacher_of("digits-uncond", tmp_path / "none") == "digits-uncond" and not (tmp_path / "none").exists()
    cls, kwargs = TEACHERS["song"]
    monkeypatch.setattr(providers, "preset_names", lambda: ["small"])
    monkeypatch.setattr(providers, "preset", lambda name: (cls, kwargs))
    monkeypatch.setattr(providers, "build_network", lambda case: fill(getattr(models, cls)(**kwargs), case.seed))
    folders = [teacher_of("small", tmp_path / str(i), seed) for i, seed in enumerate((7, 7, 8))]
    one, same, other = (models.load(folder).state_dict() for folder in folders)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["plain", "sign_fast"])
def test_the_trainer_is_only_in_the_memory_of_who_trains_with_it(name, small):
    program = (
        "import sys, benchmarks.training_providers as t; "
        f"t.make({name!r}, t.TrainingCase({small!r}, 2)); print('sign_fast.distill.trainer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(name == "sign_fast"), done.stderr


def test_turns_rotate():
    order = []

    def call(name):
        def one(turn):
            order.append((turn, name))
            return float(turn)

        return one

    assert take_turns({"a": call("a"), "b": call("b")}, 0, 3) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_a_provider_without_time_or_compiler_is_left_out(teacher, monkeypatch):
    def broken(name, case):
        raise AttributeError("no such node")

    case = TrainingCase(teacher, 2)
    assert begun("plain", case, 1, 0.001, True, 1) == (None, {}, "took longer than 0 s")
    monkeypatch.setattr("benchmarks.training_comparison.make", broken)
    assert begun("compile", case, 1, 60, False, None) == (None, {}, "AttributeError: no such node")
    with pytest.raises(AttributeError, match="no such node"):
        begun("sign_fast", case, 1, 60, False, None)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """training.py in this process: words -> its rows."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # and is put back afterwards
    threads = torch.get_num_threads()

    def rows(*words):
        words = [*words, "--seconds", 0, "--outdir", tmp_path, "--ledger", tmp_path / "ledger.csv", "--device", "cpu"]
        training.main([*map(str, words)], standalone_mode=False)
        return json.loads((tmp_path / "training.json").read_text())["rows"]

    yield rows
    torch.set_num_threads(threads)


def test_report(report, tmp_path, capsys):
    rows = report("--batch", 4, "--threads", 1, "--no-memory")
    names = ["plain", "sign_fast", "sign_fast_combined"]
    assert [(row["provider"], row["batch"], row["network_passes"]) for row in rows] == [
        (name, 4, passes) for name, passes in zip(names, (11, 11, 9), strict=True)
    ]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["rounds"] >= 3
        assert row["seconds_per_iteration"] == pytest.approx(4 / row["images_per_second"])
        assert row["ratio_to_plain"] == pytest.approx(rows[0]["seconds_per_iteration"] / row["seconds_per_iteration"])
        assert row["dtype"] == "float32" and "peak_mb" not in row
    out = capsys.readouterr().out
    assert "s/iteration" in out and "passes" in out and "vs plain" in out
    assert Image.open(tmp_path / "training.png").size[0] > 300
    written = book.read(tmp_path / "ledger.csv")
    assert [(row["mode"], row["method"], row["provider"], row["threads"]) for row in written] == [
        ("training", "sid", name, "1") for name in names
    ]
    assert os.environ["OMP_NUM_THREADS"] == "1"  # what child processes take over
    page = rewritten("<!-- ledger mode=training preset=digits-uncond -->\n<!-- /ledger -->", written)
    assert "| batch | provider | images/s | s/iteration |" in page and "| network passes |" in page
    assert [line.split("|")[2].strip() for line in page.splitlines()[3:6]] == [f"`{name}`" for name in names]
    assert "sid 1 step(s)" in page


def test_choices_and_json(report, tmp_path, capsys):
    rows = report("--update", "combined", "--batch", 2, "--no-memory", "--json", "--preset", "digits-cond")
    assert [row["provider"] for row in rows] == ["plain", "sign_fast_combined"]
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    (row,) = report("--providers", "sign_fast", "--batch", 2)
    assert row["provider"] == "sign_fast" and "ratio_to_plain" not in row
    assert row["peak_mb"] > 100 and "peak MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch", "0"], "--batch"),
        (["--method", "magic"], "--method"),
        (["--providers", "plain,magic"], "unknown provider 'magic'"),
        (["--preset", "nowhere"], "no network 'nowhere'"),
        (["--device", "cuda:77"], "is not here"),
        (["--outdir", "Makefile/x"], "cannot write"),
    ],
)
def test_bad_arguments(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["training.py", "--outdir", str(tmp_path), "--no-ledger", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code and message in line and not list(tmp_path.iterdir())


def test_it_runs_as_a_file():
    program = str(ROOT / "benchmarks" / "training.py")
    done = subprocess.run([sys.executable, program, "--batch", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("training: error: ") and "Traceback" not in done.stderr

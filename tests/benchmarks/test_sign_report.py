"""SIGN's report on small numbers: what it measures, that finished runs are kept, bad input. Nothing asserts on time."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.sign_evidence import ablation as ablations
from benchmarks.sign_evidence import cost, toy, toy_report
from benchmarks.sign_evidence.ablation import ablation, shortened
from benchmarks.sign_evidence.arms import WHOLE, Results, arms_of, environments_note, over_seeds, terms_of
from benchmarks.sign_evidence.measure import iterates, moves
from benchmarks.sign_evidence.network import measure_network, teacher_of
from benchmarks.sign_evidence.tables import ABLATION, markdown
from benchmarks.sign_report import sign_report
from sign_fast.checkpoints.store import save_network
from sign_fast.distill.networks import build_networks, load_teacher
from sign_fast.distill.recipes import settings_from
from sign_fast.distill.trainer import Distiller
from sign_fast.errors import SignFastError
from sign_fast.metrics.digits_classifier import digits_distance
from sign_fast.sampling import ImageGenerator

CPU = torch.device("cpu")
SMALL = toy_report.Sizes(teacher=6, student=3, samples=200)


def save_untrained(folder, name):
    """A student as it is before its first iteration."""
    teacher, cls, kwargs = load_teacher(name, CPU)
    nets = build_networks(teacher, cls, kwargs, time_free=True)
    facts = {"role": "student", "trained": {"teacher": name, "images": 1000}}
    save_network(folder, nets.ema.state_dict(), nets.student_class, nets.student_kwargs, **facts)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("sign") / "network", "digits-uncond")


def run(outdir, *words):
    threads = torch.get_num_threads()
    try:
        sign_report.main(
            [*map(str, words), "--device", "cpu", "--threads", "1", "--outdir", str(outdir)], standalone_mode=False
        )
    finally:
        torch.set_num_threads(threads)
    return json.loads((outdir / "report.json").read_text())


def test_report_of_a_network(untrained, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # and is put back afterwards
    report = run(tmp_path, "--network", untrained, "--num", 40)
    rows = {(row["name"], row.get("steps")): row for row in report["network"]}
    assert [k for name, k in rows if name == "student, recursive"] == [1, 2, 3, 4]
    assert [k for name, k in rows if name == "student, multi-step"] == [2, 3, 4]
    assert [k for name, k in rows if name == "teacher, Heun"] == [1, 2, 5, 18]
    first, start = rows["student, recursive", 1], rows["student before training", 1]
    for column in ("frechet_distance", "move_noise", "move_data", "reconstruction"):
        assert first[column] == pytest.approx(start[column], rel=1e-4)
    teacher = ImageGenerator.from_pretrained("digits-uncond", "cpu")
    images = teacher(range(40), 18).permute(0, 3, 1, 2)
    assert rows["teacher, Heun", 18]["frechet_distance"] == pytest.approx(digits_distance(images), rel=1e-3)
    for name in ("identity", "constant (mean image)"):
        assert rows[name, None]["move_noise"] == rows[name, None]["move_data"] == 0
        assert rows[name, None]["frechet_distance"] > 5 * rows["teacher, Heun", 18]["frechet_distance"]
    assert rows["identity", None]["reconstruction"] == 0 < rows["constant (mean image)", None]["reconstruction"]
    assert rows["constant (mean image)", None]["effective_classes"] == 1
    assert rows["constant (mean image)", None]["diversity"] == pytest.approx(0, abs=1e-9)
    assert rows["held-out data", None]["images"] == 359 and rows["held-out data", None]["effective_classes"] > 9.9
    assert all(len(of[start]) == 6 for of in report["moves"].values() for start in ("noise", "data"))
    assert report["moves"]["student, recursive"]["noise"][1] == first["move_noise"]
    assert [row["images"] for row in report["cost"]] == [1_500_032, 1000]
    text = (tmp_path / "report.md").read_text()
    for name in ("quality.png", "moves.png", "classes.png", "samples.png"):
        assert f"]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 10


def test_classes_go_with_their_images(tmp_path):
    network = save_untrained(tmp_path / "network", "digits-cond")
    assert teacher_of(str(network), None) == "digits-cond"
    found = measure_network(str(network), "digits-cond", "digits:test", 30, CPU)
    rows = {row["name"]: row for row in reversed(found.rows)}
    first, start = rows["student, recursive"], rows["student before training"]
    # the one through the generator, which draws the classes itself, the other called with those that the report drew
    for column in ("frechet_distance", "diversity", "move_noise", "reconstruction"):
        assert first[column] == pytest.approx(start[column], rel=1e-4)
    assert torch.equal(found.grids["student, recursive, k = 1"], found.grids["student before training, k = 1"])
    assert 0.95 < sum(found.classes["student, recursive, k = 1"]) < 1.05 and found.notes == []


def test_moves_of_a_known_map():
    u = torch.randn(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = iterates(lambda v, labels: v / 2, u, None, 3, batch=4)
    size = float(u.double().square().mean().sqrt())
    assert torch.equal(found[3], u / 8)
    assert moves(found) == pytest.approx([size / 2, size / 4, size / 8])


def test_passes_are_those_counted_by_hand():
    weights = dict(rec=1, idem=1, flow=0.25, dmd=2, den=0, fake_updates=2)
    settings = dataclasses.replace(settings_from("digits-sign"), reg=0, **weights)
    passes = cost.passes_an_image(settings)
    # two updates of the fake score; f of z, x and u; idem and flow; the two scores of dmd
    assert passes["fake score"] == {"forward": 2 + 1, "backward to weights": 2}
    assert passes["student"] == {"forward": 2 + 3, "backward to weights": 3}
    regressed = cost.passes_an_image(dataclasses.replace(settings, reg=0.5))
    assert regressed["student"] == {"forward": 2 + 4, "backward to weights": 4}
    assert passes["frozen student"] == {"forward": 2, "backward to input": 1}
    assert passes["teacher"] == {"forward": 2}
    combined = cost.passes_an_image(dataclasses.replace(settings, update="combined"))
    assert combined["fake score"] == {"forward": 2, "backward to weights": 2}
    alone = cost.passes_an_image(dataclasses.replace(settings, dmd=0))  # nothing reads the fake score
    assert alone["fake score"] == {} and alone["student"] == {"forward": 3, "backward to weights": 3}
    assert cost.passes_an_image(dataclasses.replace(settings, dmd=0, update="combined")) == alone
    fewer = cost.passes_an_image(dataclasses.replace(settings, rec=0, idem=0, flow=0))
    assert fewer["student"] == {"forward": 2 + 1, "backward to weights": 1} and fewer["frozen student"] == {}


def test_seconds_and_settings_of_a_run(tmp_path):
    assert cost.seconds_of(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("iteration,kimg,images_per_second\n2,0.5,100\n4,1.5,200\n")
    assert cost.seconds_of(tmp_path) == pytest.approx(500 / 100 + 1000 / 200)


def test_coverage():
    modes = toy.ring()
    true = toy.coverage(modes.draw(20_000, torch.Generator().manual_seed(0)), modes)
    assert true.covered == true.modes == 8 and true.kl < 0.01
    assert true.thickness == pytest.approx(0.97, abs=0.02)
    assert true.high_quality == pytest.approx(1 - math.exp(-(toy.HIGH_QUALITY**2) / 2), abs=0.003)
    collapsed = toy.coverage(modes.centres[:1].expand(100, 2)[..., None, None], modes)
    assert (collapsed.covered, collapsed.high_quality, collapsed.thickness) == (
        1,
        1.0,
        0.0,
    ) and collapsed.kl == pytest.approx(math.log(8))
    outside = toy.coverage(torch.zeros(100, 2, 1, 1), modes)
    assert (outside.covered, outside.high_quality, outside.thickness) == (0, 0.0, None)
    assert toy.coverage(torch.full((100, 2, 1, 1), math.nan), modes).high_quality == 0


def test_mixtures_have_the_spread_that_the_teacher_takes_for_granted():
    for density in toy.DENSITIES.values():
        modes = density()
        assert modes.draw(20_000, torch.Generator().manual_seed(0)).std().item() == pytest.approx(
            (toy.SIGMA_DATA**2 + modes.std**2) ** 0.5, abs=0.01
        )


def test_toy_teacher_nears_the_posterior_mean():
    modes = toy.ring()
    generator = torch.Generator().manual_seed(0)
    x = modes.draw(500, generator)
    sigma = 0.3
    u = x + sigma * torch.randn(x.shape, generator=generator)
    points, variance = u.flatten(1)[:, None], modes.std**2 + sigma**2
    weight = (-(points - modes.centres).square().sum(2) / (2 * variance)).softmax(1)
    means = (modes.centres * sigma**2 + points * modes.std**2) / variance
    exact = (weight[..., None] * means).sum(1)[..., None, None]
    errors = [float((toy.train_teacher(modes, n)(u, sigma) - exact).square().mean()) for n in (1, 400)]
    assert errors[1] < 0.3 * errors[0]


def test_toy_student_begins_as_the_teacher():
    teacher = toy.train_teacher(toy.ring(), 3)
    u = toy.latents(5, 0)
    assert torch.equal(toy.Student(teacher)(u), teacher(81 * u, 80.0))


def test_without_den_is_without_dmd():
    modes, teacher = toy.ring(), toy.train_teacher(toy.ring(), 3)
    den, dmd, whole = (
        toy.distil(teacher, modes, toy.settings(3, **changes)).state_dict() for changes in ({"den": 0}, {"dmd": 0}, {})
    )
    assert all(torch.equal(den[name], dmd[name]) for name in den)
    assert not all(torch.equal(den[name], whole[name]) for name in den)


def without_seconds(rows):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_toy_report_is_deterministic_and_resumes(tmp_path):
    def rows(folder, said):
        folder.mkdir(exist_ok=True)
        found, pictures = toy_report.report("ring", SMALL, (0,), True, folder, said.append)
        assert pictures == ["toy-ring.png", "toy-ring-arms.png"]
        return without_seconds(found)

    arms = arms_of(toy.settings(SMALL.student))
    said: list[str] = []
    first = rows(tmp_path / "a", said)
    assert [text.split(": ")[1] for text in said] == ["teacher", *arms]
    assert {row["name"] for row in first} == {"true samples", "identity", "teacher, 18 Heun steps", *arms}
    assert [row["steps"] for row in first if row["name"] == "without idem"] == [1, 2, 3, 4]
    at = {row["name"]: row["reconstruction"] for row in first if row.get("steps") == 1}
    assert all(at[name] != at[WHOLE] for name in arms if name != WHOLE)
    drawn = {}
    for name in ("toy-ring.png", "toy-ring-arms.png"):
        with Image.open(tmp_path / "a" / name) as picture:
            assert min(picture.size) > 300
            drawn[name] = picture.tobytes()
        (tmp_path / "a" / name).unlink()
    said.clear()
    assert rows(tmp_path / "a", said) == first and said == ["toy, ring of 8, seed 0: teacher"]
    for name, pixels in drawn.items():  # a picture that went missing is drawn again, from what was kept
        with Image.open(tmp_path / "a" / name) as picture:
            difference = np.abs(np.frombuffer(picture.tobytes(), np.uint8) - np.frombuffer(pixels, np.uint8) * 1.0)
            assert difference.mean() < 0.5, name
    assert rows(tmp_path / "b", []) == first


def test_toy_figures_are_means_over_seeds(tmp_path):
    rows, _ = toy_report.report("ring", SMALL, (3, 4), False, tmp_path, lambda text: None)
    alone = [toy_report.report("ring", SMALL, (seed,), False, tmp_path, lambda text: None)[0] for seed in (3, 4)]
    one, other = ({row["name"]: row for row in reversed(found)}[WHOLE] for found in alone)
    row = {row["name"]: row for row in reversed(rows)}[WHOLE]
    values = torch.tensor([one["kl"], other["kl"]], dtype=torch.float64)
    assert row["seeds"] == 2 and one["seeds"] == 1 and one["spread"] == {}
    assert row["kl"] == pytest.approx(float(values.mean()))
    assert row["spread"]["kl"] == pytest.approx(float(values.std())) and row["spread"]["kl"] > 0


def test_over_seeds():
    runs = [{"name": "a", "n": 1.0, "m": 2, "of": {"x": 1.0}}, {"name": "a", "n": 3.0, "m": 2, "of": {"x": 2.0}}]
    row = over_seeds(runs)
    assert (row["name"], row["n"], row["m"], row["of"]["x"]) == ("a", 2.0, 2, 1.5)
    assert row["spread"] == {"n": pytest.approx(2**0.5)}
    assert over_seeds([{"thickness": 1.0}, {"thickness": None}])["thickness"] is None


PLACE = {"commit": "c1", "device": "d", "threads": 1, "torch": "t"}


def test_finished_arms_are_kept(tmp_path):
    path = tmp_path / "arms.json"
    runs = []

    def get(arm, place=PLACE, **settings):
        return Results(path).get(arm, settings, place, lambda: runs.append(arm) or {"value": len(runs)})

    found = [get("a", lr=1, betas=(0, 1)), get("b", lr=3), get("a", lr=1, betas=(0, 1)), get("a", lr=2)]
    assert [row["value"] for row in found] == [1, 2, 1, 3]
    assert get("another name of b", lr=3)["value"] == 2  # the same run
    assert get("b", {**PLACE, "commit": "c2"}, lr=3)["environment"] == PLACE  # where it did run
    path.write_text('[{"arm"')
    with pytest.raises(SignFastError, match=r"arms\.json is not readable .*: remove it"):
        Results(path)


def test_rows_of_several_environments_are_told():
    rows = [{"name": "a", "environments": ["commit 1"]}, {"name": "b", "environments": ["commit 1"]}]
    assert environments_note(rows) == "Measured with commit 1."
    note = environments_note([*rows, {"name": "c", "environments": ["commit 1", "commit 2"]}])
    assert note.startswith("WARNING: ") and "a, b, c: commit 1." in note and "c: commit 2." in note


@pytest.mark.parametrize("base", ["digits-sign", "digits-sign-cond", None])
def test_every_arm_is_another_run(base):
    settings = toy.settings(3) if base is None else settings_from(base)
    arms = arms_of(settings)
    changed = {name: dataclasses.replace(settings, **changes) for name, changes in arms.items()}
    assert len(set(changed.values())) == len(arms) and next(iter(arms)) == WHOLE
    assert ("without reg" in arms, "with reg" in arms) == ((False, True) if base is None else (True, False))
    assert f"reg {settings.reg:g}" in terms_of(settings)
    assert "data-free" not in arms_of(dataclasses.replace(settings, data=None))


def test_ablation(tmp_path, monkeypatch):
    lengths = dict(kimg=100, idem_ramp_kimg=64, ema_halflife_kimg=44)
    settings = dataclasses.replace(settings_from("digits-sign"), batch=4, pairs=8, **lengths)
    short = shortened(settings, settings.kimg / 2)
    assert (short.kimg, short.idem_ramp_kimg, short.ema_halflife_kimg) == (50, 32, 22)
    said: list[str] = []
    sampled: list[int] = []
    make = ablations.make_pairs

    def make_pairs(teacher, count, seed):
        sampled.append(seed)
        return make(teacher, count, seed)

    monkeypatch.setattr(ablations, "make_pairs", make_pairs)
    monkeypatch.setattr("sign_fast.distill.pairs.make_pairs", None)  # of a distillation by itself
    arms = ("all terms", "without dmd", "SiD loss for dmd", "without reg", "data-free")

    def rows(arms=arms):
        path = tmp_path / "arms.json"
        return ablation(settings, 0.008, (0, 1), "digits:test", 20, CPU, path, arms, said.append)

    first = rows()
    assert [row["name"] for row in first] == list(arms) and len(said) == 10
    assert sampled == [0, 1]  # once a seed for all arms, and outside of what is timed
    assert [row["name"] for row in first if "sampling_seconds" not in row] == ["without reg"]
    assert len({row["reconstruction"] for row in first}) == len(arms)
    for row in first:
        assert row["seeds"] == 2 and row["frechet_distance_1"] > 0 and row["spread"]["idempotence_noise"] > 0
    assert rows() == first and len(said) == 10
    assert "| without dmd | 2 |" in markdown(first, ABLATION)
    assert environments_note(first).startswith("Measured with commit ")
    # the same name, another teacher
    monkeypatch.setattr(ablations, "network_hash", lambda net: "another")
    rows(("without reg",))
    assert len(said) == 12


def test_shared_pairs_are_those_that_a_run_makes():
    settings = dataclasses.replace(settings_from("digits-sign"), batch=4, pairs=8, kimg=0.008)
    shared, seconds = ablations._SharedPairs(settings.teacher, CPU).of(settings)
    distillers = [Distiller(settings, None, CPU, pairs=pairs) for pairs in (None, shared)]
    one, other = (distiller.step() for distiller in distillers)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert distillers[1]._pairs is shared and seconds > 0


def test_pictures_of_earlier_reports_are_not_shown(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "ablation.png")
    words = [
        "--toy",
        "--density",
        "ring",
        "--toy-teacher",
        2,
        "--toy-student",
        1,
        "--toy-samples",
        50,
        "--seeds",
        "0,1",
    ]
    report = run(tmp_path, *words)
    assert report["images"] == ["toy-ring.png"]
    text = (tmp_path / "report.md").read_text()
    assert "seeds 0, 1" in text and "reg 0" in text and "Measured with commit " in text
    assert {row["seeds"] for row in report["toy"]["ring"]} == {2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "digits-uncond"], "takes a noise level"),
        (["--network", "digits-uncond", "--teacher", "digits-cond"], "takes a noise level"),
        (["--ablation", "--arms", "without x"], "no arm 'without x'"),
        (["--ablation", "--recipe", "digits-sid"], "these settings are of sid"),
    ],
)
def test_bad_input(tmp_path, words, message):
    with pytest.raises(SignFastError, match=message):
        run(tmp_path, *words)


def test_teacher_and_data_must_fit(untrained, tmp_path):
    with pytest.raises(SignFastError, match="the teacher digits-cond makes other images"):
        run(tmp_path, "--network", untrained, "--teacher", "digits-cond")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(SignFastError, match="name its --data"):
        run(tmp_path / "out", "--network", untrained, "--data", tmp_path)

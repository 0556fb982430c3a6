"""PSNR by its definition, and the table of a student and its controls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sign_fast import ImageGenerator, models
from sign_fast.data import open_dataset
from sign_fast.editing import evaluate, make_task, project, psnr, sdedit
from sign_fast.editing.tasks import centre_unknown
from sign_fast.errors import SignFastError
from sign_fast.functional import to_uint8
from tests.network_cases import network


def digits(count=16):
    data = open_dataset("digits:test")
    return torch.from_numpy(np.stack([data.image(i) for i in range(count)])).float() / 127.5 - 1


@pytest.fixture(scope="module")
def teacher():
    return ImageGenerator(models.load("digits-uncond", "cpu"), "teacher")


@pytest.fixture(scope="module")
def student():
    return ImageGenerator(models.IdempotentPrecond.from_teacher(models.load("digits-uncond", "cpu"), sigma=0.5))


def test_psnr():
    truth = torch.zeros(3, 2, 2, 1, dtype=torch.uint8)
    images = truth.clone()
    images[0] += 10
    images[1, 0, 0] = 255
    want = [20 * math.log10(255 / 10), 10 * math.log10(4), 10 * math.log10(12 * 255**2)]
    assert psnr(images, truth).tolist() == pytest.approx(want)
    assert psnr(truth, images).tolist() == pytest.approx(want)  # bytes do not wrap around
    with pytest.raises(ValueError, match="of one shape"):
        psnr(images, truth[:2])
    with pytest.raises(ValueError, match="uint8"):
        psnr(images.float(), truth)


@pytest.mark.parametrize("name", ["denoise", "inpaint", "super-resolve", "sketch", "project"])
def test_scores_are_of_the_edits(student, teacher, name):
    truth, seeds = digits(), list(range(100, 116))
    task = make_task(name, known=centre_unknown(8))
    options = {"noise_level": 0.4, "rounds": 2, "teacher_noise_level": 0.6}
    result = evaluate(task, truth, student=student, teacher=teacher, seeds=seeds, **options)
    assert result.rounds == 2
    assert [(s.method, s.calls, s.noise_level) for s in result.scores] == [
        ("student", 3, 0.4),
        ("identity", 0, None),
        ("teacher, Euler", 3, 0.6),
        ("teacher, Heun", 3, 0.6),
    ]
    observed = task.corruption.corrupt(truth, seeds)
    shared = {"constraint": task.constraint, "seeds": seeds, "output": "uint8"}
    want = [
        project(student, observed, noise_level=0.4, rounds=2, **shared),
        to_uint8(observed),
        sdedit(teacher, observed, noise_level=0.6, calls=3, **shared),
        sdedit(teacher, observed, noise_level=0.6, calls=3, solver="heun", **shared),
    ]
    for score, images in zip(result.scores, want, strict=True):
        assert torch.equal(result.edited[score.method], images)
        values = psnr(images, to_uint8(truth))
        assert score.psnr == pytest.approx(float(values.mean()))
        assert score.standard_error == pytest.approx(float(values.std()) / 4)
    assert torch.equal(result.truth, to_uint8(truth)) and torch.equal(result.observed, want[1])


def test_the_teacher_takes_light_noise_away(student, teacher):
    """At the noise that was added a trained denoiser must beat doing nothing by far, or the control is no control."""
    task = make_task("denoise", noise_std=0.4)
    options = {"noise_level": 0.25, "rounds": 0, "teacher_noise_level": 0.25}
    result = evaluate(task, digits(100), student=student, teacher=teacher, **options)
    scores = {score.method: score.psnr for score in result.scores}
    assert set(scores) == {"student", "identity", "teacher, Euler"}
    assert scores["teacher, Euler"] > scores["identity"] + 3
    assert scores["student"] > scores["identity"] + 3  # frozen at σ = 0.5 it is a denoiser too


def test_task_s_own_levels_and_one_image(student):
    task = make_task("super-resolve")
    result = evaluate(task, digits(1), student=student)
    assert [(s.method, s.calls, s.noise_level) for s in result.scores] == [
        ("student", task.rounds + 1, task.noise_level),
        ("identity", 0, None),
    ]
    assert all(s.standard_error is None for s in result.scores)


def test_labels_go_to_those_that_have_classes(teacher):
    student = ImageGenerator(models.IdempotentPrecond.from_teacher(models.load("digits-cond", "cpu")))
    task, labels = make_task("project"), [0, 1, 2, 3]
    result = evaluate(task, digits(4), student=student, teacher=teacher, labels=labels)
    want = project(student, task.corruption.corrupt(digits(4), range(4)), noise_level=task.noise_level,
                   rounds=task.rounds, labels=labels, output="uint8")  # fmt: skip
    assert torch.equal(result.edited["student"], want)
    with pytest.raises(SignFastError, match="this network has classes"):
        evaluate(task, digits(4), student=student)


def test_batches_change_nothing(teacher):
    net = models.IdempotentPrecond.from_teacher(models.load("digits-cond", "cpu"))
    engines = [ImageGenerator(net).engine, teacher.engine]
    task, options = make_task("inpaint", known=centre_unknown(8)), {"labels": list(range(7)), "rounds": 2}
    whole = evaluate(task, digits(7), student=engines[0], teacher=engines[1], **options)
    sizes = []
    for engine in engines:
        edit = engine.edit
        engine.edit = lambda plan, images, *rest, edit=edit: sizes.append(len(images)) or edit(plan, images, *rest)
    parts = evaluate(task, digits(7), student=engines[0], teacher=engines[1], batch=3, **options)
    assert sizes == [3, 3, 1] * 3  # student, Euler, Heun
    for name, images in whole.edited.items():
        assert (images.int() - parts.edited[name].int()).abs().max() <= 1  # rounding of a sum in another order
    assert [s.psnr for s in whole.scores] == pytest.approx([s.psnr for s in parts.scores], abs=0.05)


def test_colour():
    """Luma holds in colour, whatever the network."""
    student = models.IdempotentPrecond.from_teacher(network("ddpmpp"))
    truth = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    result = evaluate(make_task("colorize"), truth, student=student)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    difference = (result.edited["student"].double() - result.truth.double()) @ weights
    assert difference.abs().max() <= 0.51  # half a level of rounding
    assert result.edited["student"].float().std(-1).mean() > 5  # and it is coloured
    with pytest.raises(SignFastError, match="RGB"):
        evaluate(make_task("colorize"), digits(2), student=student)

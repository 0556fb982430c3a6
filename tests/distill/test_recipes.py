"""Recipes: the published settings, what goes over them, and names that are wrong."""

from __future__ import annotations

import pytest

from sign_fast.checkpoints.store import bundled_names
from sign_fast.data import open_dataset
from sign_fast.distill.networks import load_teacher
from sign_fast.distill.recipes import recipe, recipe_names, settings_from
from sign_fast.distill.settings import check_fit, check_settings
from sign_fast.errors import SignFastError

PUBLISHED = {
    "cifar10-uncond": {"batch": 256, "lr": 1e-5, "dropout": 0.13, "ema_halflife_kimg": 500, "alpha": 1.2},
    "cifar10-cond": {"batch": 256, "lr": 1e-5, "dropout": 0.13, "ema_halflife_kimg": 500, "alpha": 1.2},
    "imagenet64": {"batch": 8192, "lr": 4e-6, "dropout": 0.1, "ema_halflife_kimg": 2000, "precision": "fp16"},
    "ffhq64": {"batch": 512, "lr": 1e-5, "dropout": 0.05, "betas": (0.9, 0.999), "fake_betas": (0.0, 0.999)},
    "afhq64": {"batch": 512, "lr": 5e-6, "alpha": 1.0, "betas": (0.0, 0.999), "fake_betas": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    found = settings_from(name, teacher="T")
    common = {"method": "sid", "steps": 1, "eps": 1e-8, "sigma_init": 2.5, "tmax": 800, "student_scale": 100}
    for key, value in {**common, **PUBLISHED[name]}.items():
        assert getattr(found, key) == value, key
    adversarial = settings_from(name, teacher="T", method="sida", data="D")
    assert adversarial.alpha == 1.0 and adversarial.batch == found.batch
    assert (adversarial.student_kimg, adversarial.adversarial_kimg, adversarial.adversarial_weight) == (100, 200, 0.01)
    with pytest.raises(SignFastError, match="name a --teacher"):
        settings_from(name)


def test_recipes_of_the_digits_run_as_they_are(tmp_path):
    for name in ("digits-sid", "digits-sid-4step", "digits-sign", "digits-sign-cond"):
        s = settings_from(name)
        check_settings(s)
        assert s.teacher in bundled_names()
        teacher, _, _ = load_teacher(s.teacher, "cpu")
        check_fit(s, teacher, None if s.data is None else open_dataset(s.data), 1)
    assert settings_from("digits-sid-4step").steps == 4
    assert settings_from("digits-sign-cond").teacher == "digits-cond"
    assert settings_from("digits-sign").data == "digits:train"  # the rest is held out


def test_every_recipe_is_whole():
    assert set(PUBLISHED) < set(recipe_names())
    for name in recipe_names():
        assert recipe(name)["about"] and "\n" not in recipe(name)["about"]
        check_settings(settings_from(name, teacher="T"))


def test_what_is_given_goes_over_the_recipe():
    s = settings_from("cifar10-cond", teacher="T", method="sida", data="D", alpha=1.1, lr=2e-5, dropout=None)
    assert (s.method, s.alpha, s.lr, s.dropout) == ("sida", 1.1, 2e-5, 0.13)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("digit-sid", {}, "did you mean 'digits-sid'"),
        ("???", {}, "there are afhq64, cifar10-cond"),
        ("digits-sign", {"method": "sid"}, "recipe 'digits-sign' is of sign"),
        (None, {"teacher": "T"}, "name a --method"),
        (None, {"method": "sid"}, "name a --teacher"),
    ],
)
def test_bad_recipes(name, given, message):
    with pytest.raises(SignFastError, match=message):
        settings_from(name, **given)

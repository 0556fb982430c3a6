"""Named settings: recipes/NAME.json."""

from __future__ import annotations

import dataclasses
import difflib
import json
from importlib.resources import files
from typing import Any

from ..errors import SignFastError
from .run_settings import RunSettings
from .settings import DistillSettings

METHODS = ("sid", "sida", "sign", "sid-latent")
_TUPLES = ("betas", "fake_betas")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the library."""
    folder = files(__package__).joinpath("recipes")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def recipe(name: str) -> dict[str, Any]:
    """The content of a recipe: "about", settings by name, and by method what another one than its own changes.

    Raises:
        SignFastError: no such recipe.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise SignFastError(f"no recipe {name!r}: {hint}")
    content: dict[str, Any] = json.loads((files(__package__) / "recipes" / f"{name}.json").read_text("utf-8"))
    return content


def method_of(name: str | None, method: str | None) -> str:
    """The method of a recipe, or the one given in its place.

    Raises:
        SignFastError: no such recipe, it has no settings for that method, or neither is given.
    """
    if name is None and method is None:
        raise SignFastError("name a --method (sid, sida, sign or sid-latent), or a --recipe, which has one")
    if name is None:
        return str(method)
    found = recipe(name)
    own = str(found["method"])
    if method in (None, own):
        return own
    if method not in found:
        raise SignFastError(f"recipe {name!r} is of {own}: leave --method away, or --recipe")
    return str(method)


def settings_class(method: str) -> type[RunSettings]:
    """What a method's settings are."""
    if method == "sid-latent":
        from .text_to_image.settings import TextToImageSettings

        return TextToImageSettings
    return DistillSettings


def settings_from(name: str | None = None, **given: Any) -> Any:
    """Settings of a recipe, over which those given go: `DistillSettings`, or `TextToImageSettings` of sid-latent.

    ::

        settings_from("digits-sid", lr=2e-4)
        settings_from("cifar10-cond", method="sida", teacher="runs/cifar/network", data="cifar10.zip")

    Args:
        name: of a recipe; None starts from the method's defaults.
        given: settings; None means not given.

    Raises:
        SignFastError: no such recipe, it is of another method, method or teacher are missing, or a setting is of none.
    """
    given = {key: value for key, value in given.items() if value is not None}
    method = method_of(name, given.get("method"))
    found = recipe(name) if name is not None else {}
    found.pop("about", None)
    others = {other: found.pop(other) for other in METHODS if other in found}
    if name is not None and method != found["method"]:
        found |= others[method]
    settings = {**found, **given, "method": method}
    if "teacher" not in settings:
        what = "the folder of a denoiser, or a bundled name such as digits-uncond"
        if method == "sid-latent":
            what = "the folder of a diffusers pipeline"
        raise SignFastError(f"name a --teacher: {what}")
    cls = settings_class(method)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := [key for key in settings if key not in known]:
        raise SignFastError(f"{unknown[0]} is no setting of {method}: leave it away")
    settings |= {key: tuple(settings[key]) for key in _TUPLES if settings.get(key) is not None}
    return cls(**settings)

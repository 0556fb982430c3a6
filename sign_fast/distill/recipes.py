"""Named settings: recipes/NAME.json."""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from typing import Any

from ..errors import SignFastError
from .settings import DistillSettings

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


def settings_from(name: str | None = None, **given: Any) -> DistillSettings:
    """Settings of a recipe, over which those given go.

    ::

        settings_from("digits-sid", lr=2e-4)
        settings_from("cifar10-cond", method="sida", teacher="runs/cifar/network", data="cifar10.zip")

    Args:
        name: of a recipe; None starts from the defaults of `DistillSettings`.
        given: settings; None means not given.

    Raises:
        SignFastError: no such recipe, it is of another method, or method or teacher are missing.
    """
    given = {key: value for key, value in given.items() if value is not None}
    found = recipe(name) if name is not None else {}
    found.pop("about", None)
    others = {method: found.pop(method) for method in ("sid", "sida", "sign") if method in found}
    method = given.get("method", found.get("method"))
    if method is None:
        raise SignFastError("name a --method (sid, sida or sign), or a --recipe, which has one")
    if name is not None and method != found["method"]:
        if method not in others:
            raise SignFastError(f"recipe {name!r} is of {found['method']}: leave --method away, or --recipe")
        found |= others[method]
    settings = {**found, **given}
    if "teacher" not in settings:
        raise SignFastError("name a --teacher: the folder of a denoiser, or a bundled name such as digits-uncond")
    settings |= {key: tuple(settings[key]) for key in _TUPLES if settings.get(key) is not None}
    return DistillSettings(**settings)

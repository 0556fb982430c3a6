"""What is asked of a generator, checked before any work: seeds, labels, steps, sampler and its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from numbers import Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import SignFastError, first_line, whole_number
from .ablation import ablation_sampler
from .edm import edm_sampler
from .noise import check_seeds
from .students import few_step, multistep, one_step, recursive

Sampler: TypeAlias = Callable[..., Tensor]
Labels: TypeAlias = int | Sequence[int] | Tensor | None
Output: TypeAlias = Literal["uint8", "float"]
Noise: TypeAlias = Literal["torch", "philox"]

DENOISER_SAMPLERS: dict[str, Sampler] = {
    "edm": edm_sampler,
    "ablation": ablation_sampler,
    "one_step": one_step,
    "few_step": few_step,
}
"""Samplers of a network with a noise level, net(x, sigma, labels)."""

TIME_FREE_SAMPLERS: dict[str, Sampler] = {"recursive": recursive, "multistep": multistep}
"""Samplers of a student without a time input, f(x)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = ("torch", "philox")
_NOT_OPTIONS = {"net", "student", "latents", "class_labels", "randn_like", "num_steps"}


def is_time_free(net: object) -> bool:
    """Whether the network takes no noise level: it says so with `time_free = True`."""
    return bool(getattr(net, "time_free", False))


@dataclass(frozen=True)
class NetworkTraits:
    """What the checks need to know of a network.

    Args:
        label_dim: number of classes, 0 for none.
        time_free: takes no noise level.
        lacks: attributes that Heun's samplers need and the network does not have.
    """

    label_dim: int
    time_free: bool
    lacks: tuple[str, ...]

    @classmethod
    def of(cls, net: Any) -> NetworkTraits:
        """Those of a network."""
        lacks = tuple(name for name in ("sigma_min", "sigma_max", "round_sigma") if not hasattr(net, name))
        return cls(getattr(net, "label_dim", 0), is_time_free(net), lacks)


@dataclass(frozen=True)
class Request:
    """Images that are asked for, checked: the arguments of `Engine.generate`."""

    seeds: list[int]
    sampler: str | Sampler
    steps: int
    labels: list[int] | None
    output: Output
    options: dict[str, Any]

    def cut(self, sizes: Iterable[int]) -> list[Request]:
        """The same in batches of these sizes."""
        stops = list(accumulate(sizes))
        return [
            replace(self, seeds=self.seeds[a:b], labels=None if self.labels is None else self.labels[a:b])
            for a, b in zip([0, *stops], stops, strict=False)
        ]


def check_choices(dtype: torch.dtype | None, noise: str) -> None:
    """Whether a network can be run in this dtype, with this noise.

    Raises:
        SignFastError: it cannot.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SignFastError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    if noise not in NOISES:
        raise SignFastError(f"noise must be {' or '.join(NOISES)}, not {noise!r}")


def check_request(
    net: NetworkTraits,
    seeds: Iterable[int],
    sampler: str | Sampler,
    steps: int,
    labels: Labels,
    output: str,
    options: dict[str, Any],
    noise: Noise = "torch",
) -> Request:
    """The request, or a SignFastError in one line that says what is wrong with it and how to mend it."""
    numbers = check_seeds(seeds, noise=noise)
    if output not in ("uint8", "float"):
        raise SignFastError(f"output must be uint8 or float, not {output!r}")
    steps = check_steps(steps)
    check_sampler(net, sampler, steps, options)
    return Request(numbers, sampler, steps, check_labels(labels, len(numbers), net.label_dim), output, options)  # type: ignore[arg-type]


def check_steps(steps: object) -> int:
    """steps as an int.

    Raises:
        SignFastError: not a whole number, or less than 1.
    """
    number = whole_number(steps, "steps")
    if number < 1:
        raise SignFastError(f"steps must be at least 1, not {number}")
    return number


def check_labels(labels: Labels, count: int, label_dim: int) -> list[int] | None:
    """One class number an image, or None for labels drawn from the seeds.

    Raises:
        SignFastError: labels on an unconditional network, a label out of range, or not one label an image.
    """
    if labels is None:
        return None
    if label_dim == 0:
        raise SignFastError("this network is unconditional: leave the class labels away")
    given = labels.reshape(-1).tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    wanted = list(given) if isinstance(given, Iterable) else [given]
    if len(wanted) not in (1, count):
        raise SignFastError(f"{len(wanted)} class labels for {count} images: give one, or one an image")
    numbers = [whole_number(label, "class label") for label in wanted]
    for number in numbers:
        if not 0 <= number < label_dim:
            raise SignFastError(f"class label {number} is out of range: this network has classes 0 to {label_dim - 1}")
    return numbers * count if len(numbers) == 1 else numbers


def check_sampler(net: NetworkTraits, sampler: str | Sampler, steps: int, options: dict[str, Any]) -> None:
    """Whether the sampler exists, goes with the network and takes the options.

    Raises:
        SignFastError: it does not.
    """
    if callable(sampler):
        _check_callable(sampler, steps, options)
        return
    fitting, others = DENOISER_SAMPLERS, TIME_FREE_SAMPLERS
    if net.time_free:
        fitting, others = others, fitting
    if sampler in others:
        kind = "takes no noise level" if net.time_free else "takes a noise level"
        raise SignFastError(f"sampler {sampler} does not fit: this network {kind}: use {' or '.join(fitting)}")
    if sampler not in fitting:
        known = ", ".join([*DENOISER_SAMPLERS, *TIME_FREE_SAMPLERS])
        raise SignFastError(f"unknown sampler {sampler!r}: known: {known}")
    _check_options(sampler, fitting[sampler], options)
    if sampler == "one_step" and steps != 1:
        raise SignFastError(f"the one_step sampler makes 1 step, not {steps}: use few_step")
    if sampler in ("edm", "ablation") and net.lacks:
        raise SignFastError(f"sampler {sampler} needs {', '.join(net.lacks)} of the network: set them, or use few_step")
    if sampler == "multistep":
        _check_noise_levels(steps, options)


@lru_cache
def sampler_options(sampler: Sampler) -> dict[str, Any]:
    """The options of a sampler function and their defaults."""
    parameters = inspect.signature(sampler).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _NOT_OPTIONS}


def _check_options(name: str, sampler: Sampler, options: dict[str, Any]) -> None:
    known = sampler_options(sampler)
    if unknown := [option for option in options if option not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise SignFastError(f"sampler {name} has no option {', '.join(unknown)}: {has}")
    for option, value in options.items():
        default = known[option]
        if isinstance(default, str) and not isinstance(value, str):
            raise SignFastError(f"option {option} of sampler {name} must be a word such as {default}, not {value!r}")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if isinstance(default, Real | None) and not number and not (value is default is None):
            raise SignFastError(f"option {option} of sampler {name} must be a number, not {value!r}")


def _check_noise_levels(steps: int, options: dict[str, Any]) -> None:
    levels = options.get("noise_levels")
    if not isinstance(levels, Sequence):
        raise SignFastError("sampler multistep needs noise_levels, a list of one in [0, 1] a step after the first")
    if not all(isinstance(tau, Real) and 0 <= float(tau) <= 1 for tau in levels):
        raise SignFastError(f"noise_levels must be numbers in [0, 1], not {list(levels)}")
    if len(levels) != steps - 1:
        raise SignFastError(f"{len(levels)} noise_levels for {steps} steps: give one for each step after the first")


def _check_callable(sampler: Sampler, steps: int, options: dict[str, Any]) -> None:
    """A sampler of one's own must take `edm_sampler`'s first four arguments, num_steps and the options."""
    try:
        signature = inspect.signature(sampler)
    except (TypeError, ValueError):  # some built-in functions do not tell
        return
    try:
        signature.bind(None, None, None, None, num_steps=steps, **options)
    except TypeError as error:
        name = getattr(sampler, "__name__", type(sampler).__name__)
        raise SignFastError(
            f"sampler {name} cannot be called as {name}(net, latents, class_labels, randn_like, num_steps=..., "
            f"**options): {first_line(error)}"
        ) from error

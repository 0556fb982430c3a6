"""What a pipeline is called with, checked before any work: steps, noise, size, prompts, generators and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...errors import SignFastError, short, whole_number
from ...sampling.noise import SeededNoise, check_seeds
from ...sampling.students import RandnLike, StepNoise

NOISES = ("fresh", "fixed", "ddim")
MOST_STEPS = 625
"""With more, the grid of few-step SiD would name a step twice."""


def check_steps(value: Any) -> int:
    """num_inference_steps as an int.

    Raises:
        SignFastError: not a whole number from 1 to `MOST_STEPS`.
    """
    steps = whole_number(value, "num_inference_steps")
    if not 1 <= steps <= MOST_STEPS:
        raise SignFastError(f"num_inference_steps must be 1 to {MOST_STEPS}, not {steps}")
    return steps


def check_noise_type(value: Any) -> StepNoise:
    """noise_type, one of `NOISES`.

    Raises:
        SignFastError: it is none of them.
    """
    if value not in NOISES:
        raise SignFastError(f"noise_type must be {', '.join(NOISES[:-1])} or {NOISES[-1]}, not {short(value)}")
    return value  # type: ignore[no-any-return]


def check_size(height: Any, width: Any, own: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(height, width) in pixels.

    Args:
        height, width: those asked for; None means `own`.
        own: those that the network was trained with.
        pixels: of a latent, on a side.

    Raises:
        SignFastError: not a whole number, or no multiple of `pixels`.
    """
    sides = []
    for name, given, side in (("height", height, own[0]), ("width", width, own[1])):
        number = side if given is None else whole_number(given, name)
        if number < 1 or number % pixels:
            raise SignFastError(f"{name} must be a multiple of {pixels} pixels, not {number}")
        sides.append(number)
    return sides[0], sides[1]


def check_prompts(prompt: Any, states: Any, pooled: Any, widths: tuple[int, int | None]) -> list[str] | None:
    """The prompts as a list, None where embeddings are given in their place.

    Args:
        prompt: a text or several.
        states, pooled: prompt_embeds (prompts, T, D) and pooled_prompt_embeds (prompts, P), or None.
        widths: D and P of the pipeline; P is None where it takes no pooled embedding.

    Raises:
        SignFastError: neither or both are given, no prompts, something that is no text, another shape, or no floats.
    """
    if (prompt is None) == (states is None):
        raise SignFastError("give prompts or prompt_embeds, one of them")
    if states is None:
        if pooled is not None:
            raise SignFastError("pooled_prompt_embeds go with prompt_embeds: give both or neither")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise SignFastError(f"prompt must be a text or a list of texts, one at least, not {short(prompt)}")
        return list(texts)
    if not _is_floats(states) or states.ndim != 3 or states.shape[2] != widths[0] or not states.numel():
        raise SignFastError(f"prompt_embeds must be (prompts, tokens, {widths[0]}) floats, not {_shape(states)}")
    if widths[1] is None:
        if pooled is not None:
            raise SignFastError("this pipeline takes no pooled_prompt_embeds: leave them away")
    elif not _is_floats(pooled) or tuple(pooled.shape) != (len(states), widths[1]):
        raise SignFastError(f"pooled_prompt_embeds must be {(len(states), widths[1])} floats, not {_shape(pooled)}")
    return None


def check_latents(latents: Any, shape: tuple[int, ...]) -> Tensor:
    """Latents that are given, in the shape that the prompts and the size ask for.

    Raises:
        SignFastError: they have another, or are no floats.
    """
    if not _is_floats(latents) or tuple(latents.shape) != shape:
        raise SignFastError(f"latents must be {shape} floats for these prompts and this size, not {_shape(latents)}")
    return latents


def draws_of(count: int, device: torch.device, generator: Any, seeds: Any) -> RandnLike:
    """What draws the noise of `count` images, latents first, by diffusers' convention or ours.

    Args:
        generator: None, one torch.Generator for all images together, or one an image, which draws for it alone.
        seeds: one an image, each of which draws for it alone; or None.

    Raises:
        SignFastError: both are given, not one an image, the same twice, or a generator of another device.
    """
    if seeds is not None:
        if generator is not None:
            raise SignFastError("give seeds or a generator, one of them")
        numbers = check_seeds(seeds if isinstance(seeds, Iterable) else [seeds])
        if len(numbers) != count:
            raise SignFastError(f"{len(numbers)} seeds for {count} images: give one an image")
        return SeededNoise(device, numbers).randn_like
    if generator is not None and not isinstance(generator, torch.Generator):
        generators = list(generator) if isinstance(generator, Iterable) else [generator]
        if not all(isinstance(g, torch.Generator) for g in generators):
            raise SignFastError(f"generator must be a torch.Generator, or one an image, not {short(generator)}")
        if len(generators) != count:
            raise SignFastError(f"{len(generators)} generators for {count} images: give one, or one an image")
        if len({id(g) for g in generators}) != count:
            raise SignFastError("a generator is there twice: give each image its own, or one for all")
        generator = generators
    for each in generator if isinstance(generator, list) else [generator]:
        if each is not None and each.device.type not in ("cpu", device.type):
            raise SignFastError(f"a generator on {each.device} cannot draw for a pipeline on {device}: make it there")

    def randn_like(x: Tensor) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        noise: Tensor = randn_tensor(tuple(x.shape), generator=generator, device=device, dtype=x.dtype)
        return noise

    return randn_like


def _is_floats(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else short(value)

"""Random numbers that belong to an image: each depends on the image's seed alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SignFastError, short, whole_number

MOST_SEEDS = 10**8
"""In one list."""


class SeededNoise:
    """One generator per image, as the published programs have it: batch size, order and devices change no draw.

    Args:
        device: of the generators and of what they draw.
        seeds: whole numbers, taken modulo 2³².
    """

    def __init__(self, device: str | torch.device, seeds: Iterable[int]) -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def _check(self, size: Sequence[int]) -> None:
        if len(size) == 0 or size[0] != len(self.generators):
            raise ValueError(f"the first of size {tuple(size)} must be the number of seeds, {len(self.generators)}")

    def randn(self, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Standard normal numbers of shape size = (number of seeds, …).

        Args:
            size: the shape.
            kwargs: dtype and such, handed to torch.randn.
        """
        self._check(size)
        kwargs.setdefault("device", self.device)
        return torch.stack([torch.randn(tuple(size[1:]), generator=g, **kwargs) for g in self.generators])

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers in x's shape and dtype; the samplers take this as their `randn_like`."""
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, *limits: int, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Whole numbers (int64) of shape size = (number of seeds, …).

        Args:
            limits: high, or low and high, as torch.randint takes them.
            size: the shape.
            kwargs: dtype and such, handed to torch.randint.
        """
        self._check(size)
        kwargs.setdefault("device", self.device)
        low, high = limits if len(limits) == 2 else (0, *limits)
        shape = tuple(size[1:])
        return torch.stack([torch.randint(low, high, shape, generator=g, **kwargs) for g in self.generators])


def check_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds as a list, each a whole number that names one image.

    Raises:
        SignFastError: none at all, not a whole number, negative, 2⁶³ or more, or named twice.
    """
    try:
        given = list(seeds)
    except TypeError as error:
        raise SignFastError(f"seeds must be a list of whole numbers, not {short(seeds)}") from error
    if not given:
        raise SignFastError("no seeds: give at least one")
    numbers = [whole_number(seed, "seed") for seed in given]
    for seed in numbers:
        if not 0 <= seed < 1 << 63:
            raise SignFastError(f"seed {seed} is out of range: seeds are 0 to 2^63 - 1")
    if len(set(numbers)) < len(numbers):
        twice = next(seed for seed, count in Counter(numbers).items() if count > 1)
        raise SignFastError(f"seed {twice} is there twice: a seed is one image, name it once")
    return numbers


def parse_seeds(text: str) -> list[int]:
    """'0-63,70' -> [0, …, 63, 70].

    Raises:
        SignFastError: not of that form, no seed at all, or more than can be kept in a list.
    """
    seeds: list[int] = []
    for part in text.split(","):
        part = part.strip()
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise SignFastError(f"seeds {text!r}: {part!r} is neither a number nor a range: write e.g. 0-63,70")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SignFastError(f"seeds {text!r}: the range {part} runs backwards: write {last}-{first}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise SignFastError(f"seeds {text!r}: more than {MOST_SEEDS} of them: run them in parts")
        seeds.extend(range(first, last + 1))
    return seeds

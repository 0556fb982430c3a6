"""Random numbers that belong to an image: each depends on the image's seed alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import functional
from ..errors import SignFastError, short, whole_number
from ..kernels import extension
from .transfer import to_device

MOST_SEEDS = 100_000_000
"""How many `parse_seeds` writes out: a list of more takes gigabytes, and is a slip of the hand."""


class SeededNoise:
    """One generator per image, as the published programs have it: batch size, order and devices change no draw.

    On the CPU the C++ extension draws the same numbers without an object and a call for each image.

    Args:
        device: of the generators and of what they draw.
        seeds: whole numbers, taken modulo 2³².
    """

    def __init__(self, device: str | torch.device, seeds: Iterable[int]) -> None:
        self.device = torch.device(device)
        numbers = [int(seed) % (1 << 32) for seed in seeds]
        self._count = len(numbers)
        module = extension.module() if self.device.type == "cpu" else None
        self._native = None if module is None else module.SeededNoise(numbers)
        self._generators = (
            [torch.Generator(self.device).manual_seed(seed) for seed in numbers] if self._native is None else []
        )

    def _check(self, size: Sequence[int]) -> None:
        if len(size) == 0 or size[0] != self._count:
            raise ValueError(f"the first of size {tuple(size)} must be the number of seeds, {self._count}")

    def randn(self, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Standard normal numbers of shape size = (number of seeds, …).

        Args:
            size: the shape.
            kwargs: dtype and such, handed to torch.randn.
        """
        self._check(size)
        kwargs.setdefault("device", self.device)
        if self._native is not None:
            out = torch.empty(tuple(size), **kwargs)
            self._native.normal_(out)
            return out
        return torch.stack([torch.randn(tuple(size[1:]), generator=g, **kwargs) for g in self._generators])

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
        if self._native is not None:
            kwargs.setdefault("dtype", torch.int64)
            out = torch.empty(tuple(size), **kwargs)
            self._native.randint_(out, low, high)
            return out
        shape = tuple(size[1:])
        return torch.stack([torch.randint(low, high, shape, generator=g, **kwargs) for g in self._generators])


class PhiloxNoise:
    """The same for noise="philox": draw k of an image is step k of its seed's streams, the latents being draw 0.

    The numbers are `functional.philox_normal`'s, equal on every device and cheap to make on a GPU, but not the
    published ones.

    Args:
        device: of what is drawn.
        seeds: 0 ≤ seed < 2⁶³, all bits count.
    """

    _LABELS = (1 << 32) - 1  # the last stream: no sampler makes so many draws

    def __init__(self, device: str | torch.device, seeds: Iterable[int]) -> None:
        self.seeds = to_device(torch.tensor(list(seeds), dtype=torch.int64), torch.device(device))
        self._draws = 0

    def randn(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The next draw, of shape size = (number of seeds, C, H, W), float32 numbers in `dtype`."""
        if len(size) != 4 or size[0] != len(self.seeds):
            raise ValueError(f"size must be ({len(self.seeds)}, C, H, W), not {tuple(size)}")
        noise = functional.philox_normal(self.seeds, self._draws, (size[1], size[2], size[3]))
        self._draws += 1
        return noise.to(dtype)

    def randn_like(self, x: Tensor) -> Tensor:
        """The next draw in x's shape and dtype; the samplers take this as their `randn_like`."""
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, high: int, *, size: Sequence[int]) -> Tensor:
        """⌊high·Φ(n)⌋, (number of seeds,) int64, n from a stream of its own: it changes no draw, none changes it."""
        if tuple(size) != (len(self.seeds),):
            raise ValueError(f"size must be ({len(self.seeds)},), not {tuple(size)}")
        n = functional.philox_normal(self.seeds, self._LABELS, (1, 1, 1)).flatten()
        return (torch.special.ndtr(n.double()) * high).long().clamp(max=high - 1)


def check_seeds(
    seeds: Iterable[int], *, noise: Literal["torch", "philox"] = "torch", allow_duplicates: bool = False
) -> list[int]:
    """The seeds as a list, each a whole number that names one image.

    Args:
        seeds: 0 ≤ seed < 2⁶³.
        noise: which draws they are for: the published generators ("torch") take a seed modulo 2³², so that two seeds
            that are equal modulo 2³² are one image there.
        allow_duplicates: one image may be named more than once.

    Raises:
        SignFastError: none at all, not a whole number, negative, 2⁶³ or more, or one image named twice.
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
    if allow_duplicates:
        return numbers
    named: dict[int, int] = {}
    for seed in numbers:
        name = seed % (1 << 32) if noise == "torch" else seed
        if name not in named:
            named[name] = seed
        elif named[name] == seed:
            raise SignFastError(f"seed {seed} is there twice: a seed is one image, name it once")
        else:
            raise SignFastError(
                f"seeds {named[name]} and {seed} are one image: the published draws take seeds modulo 2^32; "
                'leave one away, or use noise="philox"'
            )
    return numbers


def parse_seeds(text: str) -> list[int]:
    """'0-63,70' -> [0, …, 63, 70]; what the seeds are worth is for `check_seeds` to say.

    Raises:
        SignFastError: not of that form, no seed at all, or more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        part = part.strip()
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if match is None:
            raise SignFastError(
                f"seeds {short(text)}: {short(part)} is neither a number nor a range: write e.g. 0-63,70"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SignFastError(f"seeds {text!r}: the range {part} runs backwards: write {last}-{first}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise SignFastError(f"seeds {short(text)}: more than {MOST_SEEDS:,} images: write a shorter range")
        seeds.extend(range(first, last + 1))
    return seeds

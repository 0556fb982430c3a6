"""Random numbers as a function of (seed, stream, iteration), so that a resumed run needs no generator state."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(seed: int, *place: int) -> int:
    """A 63-bit seed for the place, e.g. seed_of(seed, STREAM, iteration, rank)."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> 1)


def generator_for(device: torch.device, seed: int, *place: int) -> torch.Generator:
    """A generator on `device`, seeded for the place."""
    return torch.Generator(device).manual_seed(seed_of(seed, *place))

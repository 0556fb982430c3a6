"""Learning-rate schedules, as factors of the base rate."""

from __future__ import annotations

import math
from typing import Literal

LearningRateSchedule = Literal["constant", "cosine"]


def learning_rate_factor(images: int, rampup: int, total: int, schedule: LearningRateSchedule) -> float:
    """Linear from 0 over `rampup` images, then constant, or half a cosine to 0 at `total` images.

    Args:
        images: seen before this step.
        rampup, total: in images.
        schedule: "constant" or "cosine".
    """
    factor = min(images / rampup, 1.0) if rampup else 1.0
    if schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * min(images / max(total, 1), 1.0)))
    return factor

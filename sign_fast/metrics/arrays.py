"""Features as the metrics take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import SignFastError

Features = npt.NDArray[Any] | Tensor


def as_tensor(features: Features, name: str, width: int | None = None) -> Tensor:
    """(N, D) features of any float dtype as a tensor that shares their memory.

    Raises:
        SignFastError: not of that shape, or not finite.
    """
    found = torch.from_numpy(features) if isinstance(features, np.ndarray) else features
    if found.ndim != 2 or not found.is_floating_point() or (width is not None and found.shape[1] != width):
        wanted = "N, D" if width is None else f"N, {width}"
        raise SignFastError(f"{name} must be ({wanted}) floats, not {tuple(found.shape)} {found.dtype}")
    for rows in found.split(4096):  # a mask of all would be as large again
        if not rows.isfinite().all():
            raise SignFastError(f"{name} are not finite: the images or the network hold NaN or infinity")
    return found

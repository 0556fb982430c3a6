"""Mixed precision: low precision inside the networks, float32 for weights in training and all between networks."""

from __future__ import annotations

import torch

from ..models.precond import Precond
from ..nn import Conv2d
from ..training.loop import PRECISIONS
from .networks import Networks


def set_precision(networks: Networks, precision: str) -> None:
    """Let the inner networks run in "fp32", "bf16" or "fp16".

    Weights that are trained, and the average, stay float32 and are cast at every call. Those of the teacher and of
    sign's frozen copy are cast now: the same numbers, since nothing but a convolution casts its weights.
    """
    dtype = PRECISIONS[precision]
    for net in (networks.teacher, networks.fake, networks.student, networks.frozen):
        if net is not None and (dtype != torch.float32 or net.dtype is None):
            net.dtype = dtype
    if dtype != torch.float32:
        for net in (networks.teacher, networks.frozen):
            if net is not None:
                _cast_convolutions(net, dtype)


def _cast_convolutions(net: Precond, dtype: torch.dtype) -> None:
    for module in net.modules():
        if isinstance(module, Conv2d):
            for weight in (module.weight, module.bias):
                if weight is not None:
                    weight.data = weight.data.to(dtype)

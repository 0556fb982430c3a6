"""The convolution's torch.ops: schemas, shapes, plain torch where C++ has not taken the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..operators import TAGS
from . import reference

OptionalTensor: TypeAlias = Tensor | None

_library = torch.library.Library("sign_fast", "FRAGMENT")
_SCHEMAS = {
    "convolution_forward": "(Tensor x, Tensor weight, Tensor? bias, str resampling) -> Tensor",
    "convolution_input_gradient": "(Tensor dy, Tensor weight, str resampling) -> Tensor",
    "convolution_weight_gradient": (
        "(Tensor dy, Tensor x, Tensor weight, str resampling, bool bias) -> (Tensor dweight, Tensor dbias)"
    ),
}


# ---- shapes: every image is channels_last ----


def _image(like: Tensor, channels: int, scale: float) -> Tensor:
    batch, _, height, width = like.shape
    if scale != 1:
        height, width = (2 * height, 2 * width) if scale == 2 else (height // 2, width // 2)
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake_forward(x: Tensor, weight: Tensor, bias: OptionalTensor, resampling: str) -> Tensor:
    return _image(x, weight.shape[0], {"none": 1, "up": 2, "down": 0.5}[resampling])


def _fake_input_gradient(dy: Tensor, weight: Tensor, resampling: str) -> Tensor:
    return _image(dy, weight.shape[1], {"none": 1, "up": 0.5, "down": 2}[resampling])


def _fake_weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, resampling: str, bias: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(weight.shape[0] if bias else 0)


# ---- plain torch ----


def _plain_forward(*arguments: Any) -> Tensor:
    return _fake_forward(*arguments).copy_(reference.convolution(*arguments))


def _plain_input_gradient(*arguments: Any) -> Tensor:
    return _fake_input_gradient(*arguments).copy_(reference.input_gradient(*arguments))


def _plain_weight_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    dweight, dbias = reference.weight_gradient(*arguments)
    return torch.empty_like(arguments[2]).copy_(dweight), dbias


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "convolution_forward": (_fake_forward, _plain_forward),
    "convolution_input_gradient": (_fake_input_gradient, _plain_input_gradient),
    "convolution_weight_gradient": (_fake_weight_gradient, _plain_weight_gradient),
}
for _name, (_shapes, _plain) in _IMPLEMENTATIONS.items():
    _library.define(_name + _SCHEMAS[_name], tags=TAGS)
    torch.library.register_fake(f"sign_fast::{_name}", _shapes, lib=_library)
    _library.impl(_name, _plain, "CompositeExplicitAutograd")

forward = torch.ops.sign_fast.convolution_forward.default
input_gradient = torch.ops.sign_fast.convolution_input_gradient.default
weight_gradient = torch.ops.sign_fast.convolution_weight_gradient.default

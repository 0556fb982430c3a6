"""The torch.ops of the sampler step: schemas, shapes, Triton on CUDA, plain torch where C++ has not taken the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..device import device_of
from ..launch import run
from ..operators import TAGS, register
from . import reference
from .launches import dense_like, launches_forward, launches_noise, readable

OptionalTensor: TypeAlias = Tensor | None

_library = torch.library.Library("sign_fast", "FRAGMENT")
_define = partial(_library.define, tags=TAGS)
_define(
    "philox_normal(Tensor seeds, SymInt step, SymInt[] shape, float scale, ScalarType dtype, bool channels_last) "
    "-> Tensor"
)
_define(
    "sampler_step(Tensor x, Tensor? network_output, Tensor? c_skip, Tensor? c_out, Tensor? seeds, SymInt step, "
    "Tensor? scale, Tensor? sigma) -> Tensor"
)
_define("finish_images(Tensor x, Tensor? network_output, Tensor? c_skip, Tensor? c_out) -> Tensor")


def _fake_normal(
    seeds: Tensor, step: int, shape: list[int], scale: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device, memory_format=layout)


def _fake_step(x: Tensor, *others: Any) -> Tensor:
    return dense_like(x)


def _fake_finish(x: Tensor, *others: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels), dtype=torch.uint8)


def _vector(t: OptionalTensor) -> OptionalTensor:
    return t if t is None else t.contiguous()


def _triton_normal(
    seeds: Tensor, step: int, shape: list[int], scale: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    y = _fake_normal(seeds, step, shape, scale, dtype, channels_last)
    if y.numel():
        run(launches_noise(seeds.contiguous(), step, y, scale, device_of(y)), y.device)
    return y


def _triton_step(
    x: Tensor,
    network_output: OptionalTensor,
    c_skip: OptionalTensor,
    c_out: OptionalTensor,
    seeds: OptionalTensor,
    step: int,
    scale: OptionalTensor,
    sigma: OptionalTensor,
) -> Tensor:
    y = dense_like(x)
    if y.numel():
        launches = launches_forward(
            readable(x),
            None if network_output is None else readable(network_output),
            y,
            _vector(c_skip),
            _vector(c_out),
            device_of(x),
            seeds=_vector(seeds),
            step=step,
            scale=_vector(scale),
            sigma=_vector(sigma),
        )
        run(launches, x.device)
    return y


def _triton_finish(x: Tensor, network_output: OptionalTensor, c_skip: OptionalTensor, c_out: OptionalTensor) -> Tensor:
    y = _fake_finish(x)
    if y.numel():
        f = None if network_output is None else readable(network_output)
        run(launches_forward(readable(x), f, y, _vector(c_skip), _vector(c_out), device_of(x)), x.device)
    return y


def _plain_step(x: Tensor, *others: Any) -> Tensor:
    return dense_like(x).copy_(reference.sampler_step(x, *others))


# name: (shapes, Triton, plain torch)
_IMPLEMENTATIONS: dict[str, tuple[Any, Any, Any]] = {
    "philox_normal": (_fake_normal, _triton_normal, reference.philox_normal),
    "sampler_step": (_fake_step, _triton_step, _plain_step),
    "finish_images": (_fake_finish, _triton_finish, reference.finish_images),
}
call = register(_library, _IMPLEMENTATIONS)

"""Dispatch of the sampler step: Triton on NVIDIA GPUs, C++ on the CPU, plain torch for gradients and the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import extension
from ..device import interpreting, supports_triton
from ..dispatch import COMPILING, DTYPES, NOT_FAST_DTYPE, TRANSFORMED, Reason, fall_back, taken, transformed
from . import reference
from .launches import launches_forward, launches_noise, shape_reason
from .registration import OptionalTensor, call

__all__ = [
    "finish_images",
    "launches_forward",
    "launches_noise",
    "philox_normal",
    "precondition",
    "sampler_step",
    "supports",
]

_GRADIENTS = Reason("gradients are wanted: plain torch differentiates it")
_COEFFICIENTS = Reason("the coefficients are not one for each image")


def supports(device: Tensor, elements: int, *dtypes: torch.dtype, noise: bool = False) -> Reason | None:
    """None when a fast version takes images of so many elements on that tensor's device, otherwise why not.

    A compiler gains nothing where there is noise to draw: it calls the operator, whatever implements that.
    """
    if not DTYPES.issuperset(dtypes):
        return NOT_FAST_DTYPE
    if device.is_cpu and not interpreting():
        if torch.compiler.is_compiling():
            return None if noise else COMPILING
        return extension.missing()
    return supports_triton(device) or shape_reason(elements)


def _supports(x: Tensor, *others: Tensor | float | None, noise: bool = False) -> Reason | None:
    if transformed():
        return TRANSFORMED
    tensors = [t for t in others if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        return _GRADIENTS
    network_output = others[0]
    dtypes = (x.dtype, network_output.dtype) if isinstance(network_output, Tensor) else (x.dtype,)
    return supports(x, math.prod(x.shape[1:]), *dtypes, noise=noise)


def _fast(reason: Reason | None, device: Tensor) -> bool:
    """Whether the fast version runs, and a note of it."""
    if torch.compiler.is_compiling():
        return reason is None
    if reason is None:
        name = "cpp" if device.is_cpu and not interpreting() else "triton"
    else:
        fall_back("sampler_step", reason)
        name = "reference"
    taken["sampler_step", name] += 1
    return reason is None


def _vector(t: Tensor | float | None, x: Tensor) -> OptionalTensor:
    """Numbers and coefficients of any shape as the (B,) or (1,) float32 of the operators."""
    if t is None:
        return None
    if isinstance(t, Tensor):
        return t.detach().to(torch.float32).reshape(-1)
    return torch.full((1,), t, dtype=torch.float32, device=x.device)


def philox_normal(
    seeds: Tensor, step: int, shape: tuple[int, ...], scale: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    if _fast(supports(seeds, math.prod(shape), dtype, noise=True), seeds):
        return call("philox_normal", seeds, step, list(shape), scale, dtype, channels_last)
    return reference.philox_normal(seeds, step, shape, scale, dtype, channels_last)


def sampler_step(
    x: Tensor,
    network_output: OptionalTensor,
    c_skip: OptionalTensor,
    c_out: OptionalTensor,
    seeds: OptionalTensor,
    step: int,
    scale: Tensor | float | None,
    sigma: Tensor | float | None,
) -> Tensor:
    reason = _supports(x, network_output, c_skip, c_out, scale, sigma, noise=seeds is not None)
    if not _fast(reason, x):
        y = reference.sampler_step(x, network_output, c_skip, c_out, seeds, step, scale, sigma)
        return y.contiguous(memory_format=suggest_memory_format(x))
    scale, sigma = (None, None) if seeds is None else (_vector(scale, x), _vector(sigma, x))
    return call("sampler_step", x, network_output, _vector(c_skip, x), _vector(c_out, x), seeds, step, scale, sigma)


def finish_images(x: Tensor, network_output: OptionalTensor, c_skip: OptionalTensor, c_out: OptionalTensor) -> Tensor:
    x = x.detach()
    network_output = None if network_output is None else network_output.detach()
    c_skip, c_out = (None if t is None else t.detach() for t in (c_skip, c_out))
    if not _fast(_supports(x, network_output, c_skip, c_out), x):
        return reference.finish_images(x, network_output, c_skip, c_out)
    return call("finish_images", x, network_output, _vector(c_skip, x), _vector(c_out, x))


def _per_image(t: Tensor, x: Tensor) -> bool:
    return t.device == x.device and (t.numel() == 1 or tuple(t.shape) == (x.shape[0], 1, 1, 1))


def precondition(x: Tensor, network_output: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    plain = x.ndim != 4 or x.shape != network_output.shape or not (_per_image(c_skip, x) and _per_image(c_out, x))
    reason = _COEFFICIENTS if plain else _supports(x, network_output, c_skip, c_out)
    if not _fast(reason, x):
        return reference.precondition(x, network_output, c_skip, c_out)
    return call("sampler_step", x, network_output, _vector(c_skip, x), _vector(c_out, x), None, 0, None, None)

"""What happens between two network calls, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def precondition(x: Tensor, network_output: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    return c_skip * x + c_out * network_output.to(x.dtype)


def renoise(denoised: Tensor, noise: Tensor, scale: Tensor | float, sigma: Tensor | float) -> Tensor:
    return scale * denoised + sigma * noise


def to_uint8(images: Tensor) -> Tensor:
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

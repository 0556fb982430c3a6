"""The calls that diffusers' networks make once `integrations.diffusers.accelerate` has been at them.

The UNets and autoencoders of Stable Diffusion 1.5 and XL run on the meta device: drawing images without gradients, and
in distillation, where a frozen network passes gradients on to its input and a trained one has its own as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.diffusers.published import AUTOENCODER, UNETS
from ..kernels.packs.calls import BATCH, Call
from ..sampling.latent_engine import LatentEngine
from ..sampling.students import StepNoise
from ..sampling.text import TextConditioning
from .recording import DTYPES, recording

_STEPS = 4
_STEP_NOISES: tuple[StepNoise, ...] = ("fresh", "ddim")  # "fixed" combines as many as "fresh"


def text_to_image(name: str, dtype: torch.dtype) -> dict[Call, None]:
    """The calls of a UNet, its autoencoder and a few-step generation with both, at the published size.

    Args:
        name: of `published.UNETS`.
        dtype: of both networks.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from ..integrations.diffusers.parts import Predictor, pixels_of

    with torch.device("meta"):
        unet = _accelerated(UNet2DConditionModel(**UNETS[name]), dtype)
        vae = _accelerated(AutoencoderKL(**AUTOENCODER), dtype)
        side, pixels = unet.config.sample_size, pixels_of(vae)
        latents = torch.empty(BATCH, unet.config.in_channels, side, side)
        images = torch.empty(BATCH, 3, side * pixels, side * pixels, dtype=dtype)
        text = TextConditioning(torch.empty(BATCH, 77, unet.config.cross_attention_dim))
        if unet.config.addition_embed_type == "text_time":
            text = TextConditioning(text.states, torch.empty(BATCH, 1280), torch.empty(BATCH, 6))
        times = torch.empty(BATCH, dtype=torch.float64)
    predict = Predictor(unet)
    with recording() as calls, torch.no_grad():
        output = predict(latents, times, text)
        vae.encode(images)
        decoded = vae.decode(latents.to(dtype)).sample
    with recording() as between:  # the networks, which need not run anew
        engine = LatentEngine(lambda *_: torch.empty_like(output), [unet, vae], lambda _: torch.empty_like(decoded))
        for steps, noise in itertools.product(range(1, _STEPS + 1), _STEP_NOISES):
            engine.rehearse(latents, text, steps, noise)
    calls |= between
    for trained in (False, True):
        unet.requires_grad_(trained)
        with recording() as found:
            _differentiate(lambda x: predict(x, times, text), latents)
        calls |= found
    return calls


def _accelerated(net: Any, dtype: torch.dtype) -> Any:
    from ..integrations.diffusers import accelerate

    net.eval()
    nn.Module.to(net, dtype)  # diffusers' own warns that weights without values are cast
    accelerate(net)
    return net


def _differentiate(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = call(x.detach().requires_grad_())
    y.backward(torch.empty_like(y))


def diffusers_networks() -> dict[str, dict[Call, None]]:
    """The calls of Stable Diffusion 1.5 at 512 pixels and XL at 1024, UNet and autoencoder.

    Raises:
        SignFastError: diffusers is not installed.
    """
    found: dict[str, dict[Call, None]] = {"sd15": {}, "sdxl": {}}
    for dtype in DTYPES:
        for name, calls in found.items():
            calls |= text_to_image(name, dtype)
    return found

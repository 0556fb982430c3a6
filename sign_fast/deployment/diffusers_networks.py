"""The calls that diffusers' networks make once their norms and attentions are ours, read off diffusers' own code.

The UNets and autoencoders of Stable Diffusion 1.5 and XL run on the meta device. Every group norm becomes our norm,
with the SiLU that follows it and the time embedding that was added before it; self-attention becomes ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import functional
from ..kernels.attention.op import supports
from ..kernels.packs.calls import BATCH, Call
from .recording import DTYPES, recording

# What the published checkpoints' configurations say beyond diffusers' defaults
_SD15 = {"sample_size": 64, "cross_attention_dim": 768}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}


class _Ours(TorchFunctionMode):
    """Makes our calls beside those that a network makes; the network's own results go on."""

    def __init__(self) -> None:
        super().__init__()
        self._added: dict[int, tuple[Tensor, Tensor]] = {}
        self._norms: dict[int, Callable[[Any], None]] = {}
        self._kept: list[Any] = []  # so that no identity is used twice

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.add, Tensor.add, Tensor.__add__) and _is_embedding(args[0], args[1]):
            self._added[id(result)] = (args[0], args[1].flatten(1))
        elif function is F.group_norm and args[0].ndim == 4:
            x, emb = self._added.get(id(args[0]), (args[0], None))
            self._norms[id(result)] = _norm(x, emb, args[1:], kwargs)
        elif function is F.silu and id(args[0]) in self._norms:
            self._norms.pop(id(args[0]))("silu")
        elif function is F.scaled_dot_product_attention:
            _attend(*args[:3])
        self._kept.append(result)
        return result

    def finish(self) -> None:
        """Make the calls of the norms that no SiLU followed."""
        for norm in self._norms.values():
            norm(None)


def _is_embedding(x: Any, other: Any) -> bool:
    """Whether a (B, C, 1, 1) tensor is added to an activation."""
    return (
        isinstance(x, Tensor)
        and isinstance(other, Tensor)
        and x.ndim == other.ndim == 4
        and other.shape[2:] == (1, 1)
        and x.shape[2:] != (1, 1)
    )


def _norm(x: Tensor, emb: Tensor | None, rest: Any, named: Any) -> Callable[[Any], None]:
    def call(activation: Any) -> None:
        inputs = dict(zip(("num_groups", "weight", "bias", "eps"), rest, strict=False)) | named
        with torch._C.DisableTorchFunction():
            layout = x.detach().to(memory_format=torch.channels_last)  # as the integration lays activations out
            given: dict[str, Any] = {"emb": None if emb is None else emb.detach()}
            functional.group_norm_silu(layout, **inputs, **given, activation=activation)
            _differentiate(layout, inputs, given, activation)

    return call


@torch.enable_grad()
def _differentiate(x: Tensor, inputs: dict[str, Any], given: dict[str, Any], activation: Any) -> None:
    for weights in (False, True):  # frozen, trained
        named: dict[str, Any] = {
            name: value.detach().requires_grad_(weights) if isinstance(value, Tensor) else value
            for name, value in {**inputs, **given}.items()
        }
        if named["emb"] is not None:
            named["emb"].requires_grad_()
        y = functional.group_norm_silu(x.detach().requires_grad_(), **named, activation=activation)
        y.backward(torch.empty_like(y))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape != k.shape or supports(q, q.shape[-1]) is not None:  # to the text's tokens, or too wide: torch's
        return
    with torch._C.DisableTorchFunction():
        q, k, v = (t.detach() for t in (q, k, v))
        functional.attention(q, k, v)
        with torch.enable_grad():
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = functional.attention(*leaves)
            out.backward(torch.empty_strided(out.shape, q.stride(), dtype=q.dtype, device="meta"))


def _record(net: nn.Module, *arguments: Any, **named: Any) -> dict[Call, None]:
    with recording() as calls, torch.no_grad(), _Ours() as mode:
        net(*arguments, **named)
        mode.finish()
    return calls


def _unet(configuration: dict[str, Any], dtype: torch.dtype) -> dict[Call, None]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = _cast(UNet2DConditionModel(**configuration), dtype)
        size, width = configuration["sample_size"], configuration["cross_attention_dim"]
        sample = torch.empty(BATCH, 4, size, size, dtype=dtype)
        text = torch.empty(BATCH, 77, width, dtype=dtype)
        more = {}
        if "addition_embed_type" in configuration:
            more["added_cond_kwargs"] = {
                "text_embeds": torch.empty(BATCH, 1280, dtype=dtype),
                "time_ids": torch.empty(BATCH, 6, dtype=dtype),
            }
        return _record(net, sample, torch.empty((), dtype=torch.int64), text, **more)


def _autoencoder(size: int, dtype: torch.dtype) -> dict[Call, None]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        net = _cast(AutoencoderKL(**_AUTOENCODER), dtype)
        images, latents = (torch.empty(BATCH, c, s, s, dtype=dtype) for c, s in ((3, size), (4, size // 8)))
        return _record(net.encoder, images) | _record(net.decoder, latents)


def _cast(net: Any, dtype: torch.dtype) -> Any:
    net.eval()
    return nn.Module.to(net, dtype)  # diffusers' own warns that weights without values are cast


def diffusers_networks() -> dict[str, dict[Call, None]]:
    """The calls of Stable Diffusion 1.5 at 512 pixels and XL at 1024, UNet and autoencoder.

    Raises:
        ImportError: diffusers is not installed.
    """
    found: dict[str, dict[Call, None]] = {"sd15": {}, "sdxl": {}}
    for dtype in DTYPES:
        found["sd15"] |= _unet(_SD15, dtype) | _autoencoder(512, dtype)
        found["sdxl"] |= _unet(_SDXL, dtype) | _autoencoder(1024, dtype)
    return found

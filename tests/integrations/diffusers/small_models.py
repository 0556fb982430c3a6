"""Small networks of diffusers' with the parts of the published ones, and how they are held to float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

SD15: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SHALLOW = SD15 | {"layers_per_block": 1}
SD2 = SHALLOW | {"use_linear_projection": True, "attention_head_dim": (2, 4)}
SDXL = {
    **SHALLOW,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
SCALE_SHIFT = SHALLOW | {"resnet_time_scale_shift": "scale_shift"}
DDPM: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
# a residual sum scaled by √½ and resampling inside of blocks, as NCSN++'s
SCORE_SDE = DDPM | {
    "layers_per_block": 1,
    "mid_block_scale_factor": 2**0.5,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
}
# its blocks also carry images to the output, each through a norm and a SiLU of their own
NCSNPP = {
    **DDPM,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "layers_per_block": 1,
    "mid_block_scale_factor": 2**0.5,
    "time_embedding_type": "fourier",
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}

Call = Callable[[Any, torch.dtype], Tensor]


def fill(model: Any) -> Any:
    """Values that reach the output: no zero convolutions, no norms at one; in eval mode."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = noise * 0.1 + (1 if "norm" in name and name.endswith("weight") else 0)
    return model.eval()


def unet(configuration: dict[str, Any]) -> UNet2DConditionModel:
    return fill(UNet2DConditionModel(**configuration))


def unconditional(configuration: dict[str, Any] = DDPM) -> UNet2DModel:
    return fill(UNet2DModel(**configuration))


def autoencoder() -> AutoencoderKL:
    return fill(AutoencoderKL(**AUTOENCODER))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_unet(net: Any, dtype: torch.dtype, x: Tensor | None = None, **named: Any) -> Tensor:
    """One call at two times with a text of seven tokens."""
    x = draw(2, 4, 16, 16, seed=1) if x is None else x
    text = draw(x.shape[0], 7, 24, seed=2).to(dtype)
    if net.config.addition_embed_type == "text_time":
        named["added_cond_kwargs"] = {
            "text_embeds": draw(x.shape[0], 16, seed=3).to(dtype),
            "time_ids": draw(x.shape[0], 6, seed=4).to(dtype),
        }
    times = torch.tensor([3, 500, 20, 900])[: x.shape[0]]
    return net(x.to(dtype), times, text, **named).sample


def call_unconditional(net: Any, dtype: torch.dtype, x: Tensor | None = None) -> Tensor:
    x = draw(2, 3, 16, 16, seed=1) if x is None else x
    return net(x.to(dtype), torch.tensor([3, 500])).sample


def call_autoencoder(net: Any, dtype: torch.dtype, x: Tensor | None = None) -> Tensor:
    """Decoded means of the encoding."""
    x = draw(2, 3, 16, 16, seed=1) if x is None else x
    return net.decode(net.encode(x.to(dtype)).latent_dist.mean).sample


def copy_in(net: nn.Module, dtype: torch.dtype) -> Any:
    """A copy in another type; both are untouched by what happens to the other."""
    return nn.Module.to(copy.deepcopy(net), dtype)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def pipeline() -> Any:
    """Stable Diffusion 1.5's parts, small; prompts come as embeddings, which need no tokenizer."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=20, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text.eval(),
        tokenizer=None,
        unet=unet(SHALLOW),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, **named: Any) -> torch.Tensor:
    """One image of two steps with guidance, (1, 3, 32, 32)."""
    return pipe(
        prompt_embeds=draw(1, 7, 24, seed=2),
        negative_prompt_embeds=draw(1, 7, 24, seed=3),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        height=32,
        width=32,
        **named,
    ).images

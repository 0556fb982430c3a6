"""Tiny text-to-image pipelines of real parts, without a network: tokenizer, CLIP text model, UNet, VAE, scheduler.

`folder(kind)` is one in diffusers' layout, for tests that do not write to it, and `write(kind, folder)` writes another.
Latents are (4, 8, 8), images 64 × 64, prompts of 16 tokens. The weights are random, the same at every call.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

KINDS = ("sd15", "sd2-v", "flow", "sdxl")
"""One CLIP text model and ε; the same and v; the same and a rectified flow; two text models, pooled states and ε."""

TOKENS = 16
"""A prompt's length, <|startoftext|> and <|endoftext|> included; "a cat" is 4."""

MERGES = ("t h", "th e</w>", "a t</w>", "c at</w>", "d o", "do g</w>", "r e", "re d</w>", "o n</w>")

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
"""Of golden/latent."""

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


@cache
def folder(kind: str) -> Path:
    """A tiny pipeline's folder, made once a process and removed at its end; leave it as it is."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return write(kind, root / kind)


def write(kind: str, folder: Path) -> Path:
    """Write a tiny pipeline of a kind into `folder`, made where it is not there, and return it."""
    with tempfile.TemporaryDirectory() as scratch:
        pipeline(kind, Path(scratch)).save_pretrained(folder)
    return folder


def pipeline(kind: str, scratch: Path) -> Any:
    """The same as diffusers' own pipeline object: StableDiffusionPipeline or StableDiffusionXLPipeline.

    Args:
        scratch: a folder for the files of the tokenizers.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = components(kind, scratch)
    if kind == "sdxl":
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def components(kind: str, scratch: Path) -> dict[str, Any]:
    """The parts by name, in eval mode."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "vae": vae(0.13025 if kind == "sdxl" else 0.18215),
            "text_encoder": text_encoder(),
            "tokenizer": tokenizer(scratch / "1"),
            "unet": unet(kind),
            "scheduler": scheduler(kind),
        }
        if kind == "sdxl":
            parts["text_encoder_2"] = text_encoder(hidden=16, projection=12)
            parts["tokenizer_2"] = tokenizer(scratch / "2", pad="!")
    return parts


def unet(kind: str) -> Any:
    """UNet2DConditionModel, 0.3 million parameters, random."""
    from diffusers import UNet2DConditionModel

    config = dict(UNET)
    if kind == "sdxl":
        config |= {
            "cross_attention_dim": 32,
            "attention_head_dim": (4, 8),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 12,
        }
    elif kind == "sd2-v":
        config |= {"attention_head_dim": (4, 8), "use_linear_projection": True}
    return UNet2DConditionModel(**config).eval()


def vae(scaling_factor: float = 0.18215) -> Any:
    """AutoencoderKL, 8 pixels a latent, random."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )
    return net.eval()


def scheduler(kind: str) -> Any:
    """DDPM's of the published schedule, or the Euler scheduler of flows."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(**SCHEDULE, prediction_type="v_prediction" if kind == "sd2-v" else "epsilon")


def text_encoder(hidden: int = 16, projection: int | None = None) -> Any:
    """CLIPTextModel, or CLIPTextModelWithProjection where a projection's width is given; random."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection or hidden,
        hidden_act="quick_gelu",
        bos_token_id=words["<|startoftext|>"],
        eos_token_id=words["<|endoftext|>"],
        pad_token_id=words["<|endoftext|>"],
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def vocabulary() -> dict[str, int]:
    """Every byte, alone and at a word's end, the merged pairs, and the two marks, as CLIP's is laid out."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """CLIPTokenizer of `TOKENS` tokens, from files that are written into `folder`.

    Args:
        pad: its padding; SDXL's second one has "!".
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {**marks, "pad_token": pad, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))

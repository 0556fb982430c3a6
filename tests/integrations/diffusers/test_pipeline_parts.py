"""What a pipeline may consist of, and whether its parts fit together."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import T5Config, T5EncoderModel

from sign_fast.integrations.diffusers import SiDPipeline
from sign_fast.integrations.diffusers.loading import load_parts
from sign_fast.integrations.diffusers.parts import LatentScale
from tests.golden_rules import normal
from tests.integrations.diffusers import tiny
from tests.integrations.diffusers.students import edit, refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, "has class_embed_type='timestep', which is not supported"),
        ({"num_class_embeds": 4}, "has num_class_embeds=4, which is not supported"),
        ({"time_cond_proj_dim": 8}, "has time_cond_proj_dim=8, which is not supported"),
        ({"addition_embed_type": "text"}, "has addition_embed_type='text', which is not supported"),
        ({"in_channels": 9}, "the UNet takes 9 and gives 4 channels, the VAE has 4"),
        ({"out_channels": 8}, "the UNet takes 4 and gives 8 channels, the VAE has 4"),
        ({"cross_attention_dim": (16, 24)}, r"embeddings of 16 numbers, the UNet takes \(16, 24\)"),
    ],
)
def test_networks_for_other_things(student, changes, message):
    refused(student, message, unet=UNet2DConditionModel(**{**tiny.UNET, **changes}))


def test_other_kinds_of_pipelines(copied):
    index = copied / "model_index.json"
    edit(index, transformer=["diffusers", "SD3Transformer2DModel"])
    refused(copied, r"has a transformer \('SD3Transformer2DModel'\), which is not supported")
    edit(index, transformer=..., unet=["diffusers", "UNet2DModel"])
    refused(copied, "its unet is diffusers.UNet2DModel, which is not supported: it must be UNet2DConditionModel")
    edit(index, unet=["diffusers", "UNet2DConditionModel"], scheduler=["diffusers", "UNet2DModel"])
    refused(copied, "its scheduler is diffusers.UNet2DModel")
    edit(index, scheduler=["diffusers", "NoSuchScheduler"])
    refused(copied, "diffusers has no NoSuchScheduler")
    edit(index, scheduler=[None, None])
    refused(copied, "names no scheduler: a pipeline needs vae, text_encoder, tokenizer, unet, scheduler")
    edit(index, scheduler=["diffusers"])
    refused(copied, r"scheduler must be \[library, class\]")


def test_what_is_left_aside(copied):
    edit(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    edit(copied / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    SiDPipeline.from_pretrained(copied)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: DDPMScheduler(prediction_type="sample"), "prediction_type 'sample': it must be epsilon, v_prediction"),
        (lambda: DDPMScheduler(num_train_timesteps=500), "has 500 steps: few-step generation is defined on 1000"),
        (lambda: DDPMScheduler(trained_betas=[2.0] * 1000), "betas make no noise schedule"),
        (lambda: EDMEulerScheduler(), "has no DDPM noise schedule"),
    ],
    ids=["sample", "500", "betas", "edm"],
)
def test_wrong_predictions_and_schedules(student, scheduler, message):
    refused(student, message, scheduler=scheduler())


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), "flow"),
        (lambda: DDPMScheduler(**tiny.SCHEDULE, prediction_type="flow_prediction"), "flow"),
        (lambda: DDPMScheduler(**tiny.SCHEDULE, prediction_type="v_prediction"), "v"),
        (lambda: DDPMScheduler(**tiny.SCHEDULE), "epsilon"),
    ],
    ids=["flow-match", "flow", "v", "epsilon"],
)
def test_predictions(student, scheduler, prediction):
    parts = load_parts(student, scheduler=scheduler())
    assert parts.prediction == prediction and (parts.alpha_bars is None) == (prediction == "flow")
    assert SiDPipeline(**parts.components()).engine.prediction == prediction


@pytest.mark.parametrize("factor", [0, -0.18215, "0.18", None, float("inf"), True], ids=str)
def test_scales_that_are_none(copied, factor):
    edit(copied / "model_index.json", vae_scaling_factor=...)
    edit(copied / "vae" / "config.json", scaling_factor=factor)
    refused(copied, "the VAE's scaling_factor must be a number above 0")


def test_a_vae_that_does_not_match(student, copied):
    refused(
        student,
        "the VAE does not match: its scaling_factor is 0.13025, the student was distilled for 0.18215",
        vae=tiny.vae(0.13025),
    )
    shallow = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    refused(student, "the VAE does not match: its pixels is 2, the student was distilled for 8", vae=shallow)
    wide = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=16)
    refused(student, "the UNet takes 4 and gives 4 channels, the VAE has 16", vae=wide)
    edit(copied / "vae" / "config.json", latents_mean=[0.0], latents_std=[1.0] * 4)
    refused(copied, "latents_mean and latents_std must be 4 numbers")


def test_parts_of_others(student):
    refused(
        student,
        "the unet is a DiTTransformer2DModel, which is not supported",
        unet=DiTTransformer2DModel.__new__(DiTTransformer2DModel),
    )
    refused(student, "the text encoders give embeddings of 16 numbers, the UNet takes 32", unet=tiny.unet("sdxl"))
    refused(student, "text_encoder_2 and tokenizer_2 go together", text_encoder_2=tiny.text_encoder(projection=12))
    refused(tiny.folder("sdxl"), "the UNet takes 36 numbers of pooled text and sizes, but gets 33",
            text_encoder_2=tiny.text_encoder(projection=9))  # fmt: skip
    refused(student, "a pipeline has no part|takes no vqvae", vqvae=None)
    t5 = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=600))
    refused(student, "the text_encoder is a T5EncoderModel, which is not supported: it must be a CLIPTextModel",
            text_encoder=t5)  # fmt: skip
    for name in ("tokenizer", "text_encoder", "scheduler", "unet", "vae"):
        for part in (None, object()):
            refused(student, f"the {name} is a (NoneType|object), which is not supported: it must be a", **{name: part})


@pytest.mark.parametrize(
    "scale",
    [LatentScale(0.18215), LatentScale(1.5, 0.06), LatentScale(0.5, 0, (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 1.5))],
    ids=["factor", "shift", "statistics"],
)
def test_latent_scales(scale):
    z = normal(1, 2, 4, 3, 3)
    mean = torch.tensor(scale.mean or [scale.shift] * 4)[:, None, None]
    std = torch.tensor(scale.std or [1.0] * 4)[:, None, None]
    torch.testing.assert_close(scale.to_vae(z), z * std / scale.factor + mean)
    torch.testing.assert_close(scale.from_vae(scale.to_vae(z)), z)

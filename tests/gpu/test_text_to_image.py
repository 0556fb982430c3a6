"""Few-step text-to-image as one CUDA graph: the pixels of the same pipeline without graphs, and of the CPU's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from sign_fast.integrations.diffusers import SiDPipeline, accelerate
from sign_fast.sampling.graphs import SWITCH, GraphRecaptureWarning
from tests.integrations.diffusers import tiny

if not torch.cuda.is_available():
    pytest.skip("CUDA graphs need a GPU", allow_module_level=True)

PROMPTS = ["a cat", "the red dog", ""]


def made(kind, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tiny teacher is no student
        return SiDPipeline.from_pretrained(tiny.folder(kind), **options)


def pixels(pipe, **options):
    return np.stack([np.asarray(image) for image in pipe(PROMPTS, seeds=[1, 2, 3], **options).images]).astype(int)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_one_launch_and_the_same_pixels(kind, dtype, monkeypatch):
    pipe = made(kind, torch_dtype=dtype).to("cuda")
    given = {"num_inference_steps": 3, "noise_type": "fresh"}
    got, again = pixels(pipe, **given), pixels(pipe, **given)
    counts = pipe.engine.graphs.statistics()
    assert (counts["captures"], counts["replays"]) == (1, 2) and np.array_equal(got, again)
    monkeypatch.setenv(SWITCH, "1")
    assert np.abs(got - pixels(pipe, **given)).max() <= 1
    monkeypatch.delenv(SWITCH)
    if dtype == torch.float32:
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        given = {"num_inference_steps": 2, "noise_type": "ddim", "output_type": "latent", "latents": latents}
        here, there = pipe(PROMPTS, **given).images.cpu(), made(kind)(PROMPTS, **given).images
        assert (here - there).abs().max() <= 1e-3 * there.abs().max()


def test_generators_of_both_devices():
    pipe = made("sd15").to("cuda")
    for device in ("cpu", "cuda"):
        generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
        several = pipe(PROMPTS[:2], 2, generator=generators, output_type="np").images
        (alone,) = pipe(PROMPTS[1], 2, generator=torch.Generator(device).manual_seed(2), output_type="np").images
        assert np.abs(several[1] - alone).max() <= 1e-3


def test_adapters_and_acceleration_are_captured_anew():
    pipe = made("sd15").to("cuda")
    first = pixels(pipe, num_inference_steps=1)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.warns(GraphRecaptureWarning):
        pipe.load_lora_weights(
            {f"{layer}.lora_A.weight": torch.randn(4, 64), f"{layer}.lora_B.weight": torch.randn(64, 4)}
        )
        loaded = pixels(pipe, num_inference_steps=1)
    assert not np.array_equal(loaded, first)
    pipe.unload_lora_weights()
    assert np.abs(pixels(pipe, num_inference_steps=1) - first).max() <= 1
    accelerate(pipe)
    assert np.abs(pixels(pipe, num_inference_steps=1) - first).max() <= 2

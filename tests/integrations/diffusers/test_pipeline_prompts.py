"""Prompts to embeddings; which prompts are refused or cut."""

from __future__ import annotations

import pytest
import torch

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import SiDPipeline
from sign_fast.integrations.diffusers.loading import load_parts
from sign_fast.integrations.diffusers.prompts import PromptEncoder
from tests.integrations.diffusers import tiny


def test_prompts(student):
    encoder = PromptEncoder(SiDPipeline.from_pretrained(student))
    prompts = ["a cat", "", "the dog"] * 3
    whole, parts = encoder.encode(prompts), encoder.encode(prompts, chunk=2)
    assert whole.states.shape == (9, 16, 16) and torch.allclose(whole.states, parts.states, atol=1e-6)
    assert torch.allclose(whole.states[1], encoder.unconditional().states[0], atol=1e-6)
    assert encoder.max_tokens == tiny.TOKENS
    for bad, message in (
        ([], "no prompts"),
        ("a cat", "must be a list"),
        ([1], "prompt 1 is no text"),
        (None, "must be a list"),
    ):
        with pytest.raises(SignFastError, match=message):
            encoder.encode(bad)
    with pytest.raises(SignFastError, match=r"prompt 'the dog .* has 22 tokens, of which 16 are read: shorten it"):
        encoder.encode(["a cat", "the dog " * 10], strict=True)
    with pytest.raises(SignFastError, match="chunk must be at least 1"):
        encoder.encode(prompts, chunk=0)


def test_prompts_of_parts_by_name(tmp_path):
    parts = tiny.components("sdxl", tmp_path)
    encoder = PromptEncoder({name: part for name, part in parts.items() if name not in ("unet", "vae")})
    with pytest.raises(SignFastError, match="SDXL is told the images' size: give size"):
        encoder.encode(["a cat"])
    text = encoder.encode(["a cat"], size=(40, 72))
    assert text.time_ids.tolist() == [[40, 72, 0, 0, 40, 72]] and text.states.shape == (1, 16, 32)
    assert PromptEncoder(parts).encode(["a cat"]).time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
    for lacking in ("text_encoder", "tokenizer_2"):
        with pytest.raises(SignFastError, match="prompts need a tokenizer and a text encoder"):
            PromptEncoder({**parts, lacking: None})
    parts["tokenizer"].add_tokens(["<new>"])
    with pytest.raises(SignFastError, match="the tokenizer has 524 words, its text encoder 523"):
        PromptEncoder(parts)


def test_an_empty_prompt_of_sdxl_is_zeros_where_its_pipeline_says_so(tmp_path):
    parts = load_parts(tiny.folder("sdxl"))
    zeros = PromptEncoder(parts).unconditional()
    assert not zeros.states.any() and not zeros.pooled.any() and zeros.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
    assert PromptEncoder(parts.components()).unconditional().states.any()
    pipe = SiDPipeline(**parts.components(), force_zeros_for_empty_prompt=True)
    assert not PromptEncoder(pipe).unconditional().states.any()

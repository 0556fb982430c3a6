"""LoRAs of `SiDPipeline`: loaded, scaled, fused and unloaded with graphs; refused whole."""

from __future__ import annotations

import importlib.util
import pickle

import diffusers
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import SiDPipeline
from sign_fast.integrations.diffusers import pipeline as pipeline_module
from sign_fast.integrations.diffusers.prompts import PromptEncoder
from sign_fast.sampling import few_step_latent
from sign_fast.sampling.graphs import GraphRecaptureWarning
from tests.golden_rules import OUTPUT_TOLERANCE, normal, relative_error
from tests.integrations.diffusers.students import fresh, latents_of

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def lora(scale, layer=f"unet.{TO_Q}", width=64):
    """A LoRA's weights for one layer, as files have them."""
    return {
        f"{layer}.lora_A.weight": scale * normal(7, 4, width),
        f"{layer}.lora_B.weight": normal(8, width, 4),
    }


def of_text(scale, encoder="text_encoder"):
    return lora(scale, f"{encoder}.{Q_PROJ}", 16)


def one(pipe):
    return latents_of(pipe, "a cat", num_inference_steps=1, seeds=1)


def test_lora_loaded_scaled_fused_and_unloaded(captured):
    pipe, counts = captured
    given = {"num_inference_steps": 1, "seeds": 1}

    def shown():
        got = latents_of(pipe, "a cat", **given)
        with torch.no_grad():
            text = PromptEncoder(pipe).encode(["a cat"])
            z = pipeline_module.draws_of(1, torch.device("cpu"), None, 1)(torch.empty(1, 4, 8, 8))
            want = few_step_latent(lambda x, t: pipe.unet(x, t, text.states).sample, z, num_steps=1)
        assert relative_error(got, want) <= OUTPUT_TOLERANCE
        return got

    first = shown()
    with pytest.warns(GraphRecaptureWarning) as record:
        pipe.load_lora_weights(lora(1.0), adapter_name="a")
        loaded = shown()
        pipe.set_adapters("a", 0.25)
        scaled = shown()
        pipe.fuse_lora()
        fused = shown()
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        last = shown()
    assert sum(issubclass(w.category, GraphRecaptureWarning) for w in record) == 1
    assert relative_error(last, first) <= OUTPUT_TOLERANCE and relative_error(fused, scaled) <= 1e-4
    assert relative_error(loaded, first) > 1e-3 and relative_error(scaled, loaded) > 1e-3
    assert counts()["graphs"] == 1 and counts()["captures"] == 5


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_adapters_are_not_read(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Harmful(str(tmp_path / "harm"))))
    pipe = fresh("sd15")
    with pytest.raises(SignFastError, match="would read pickles"):
        pipe.load_lora_weights(tmp_path / "lora", use_safetensors=False)
    for named in ({}, {"weight_name": "pytorch_lora_weights.bin"}):
        with pytest.raises(SignFastError, match="is no safetensors file on this machine"):
            pipe.load_lora_weights(tmp_path / "lora", **named)
    with pytest.raises(SignFastError, match="is no safetensors file on this machine"):
        pipe.load_lora_weights(tmp_path / "lora" / "pytorch_lora_weights.bin")
    with pytest.raises(SignFastError, match="nothing is fetched"):
        pipe.load_lora_weights("someone/lora")
    assert not (tmp_path / "harm").exists()


def test_loras_of_files(tmp_path):
    pipe, first = fresh("sd15"), one(fresh("sd15"))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    path.write_bytes(b"cut")
    for source in (tmp_path, path):
        with pytest.raises(SignFastError, match="cannot be loaded as a LoRA"):
            pipe.load_lora_weights(source)
    save_file(lora(1.0), path)
    shown = []
    for source, subfolder in ((tmp_path, None), (path, None), (tmp_path.parent, tmp_path.name)):
        pipe.load_lora_weights(source, subfolder=subfolder)
        shown.append(one(pipe))
        pipe.unload_lora_weights()
    assert (
        torch.equal(shown[0], shown[1]) and torch.equal(shown[0], shown[2]) and relative_error(shown[0], first) > 1e-3
    )


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41") and Version(transformers.__version__) >= Version("5"),
    reason="diffusers before 0.41 does not find the text encoders' layers of transformers 5",
)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_of_text_encoders_is_fused_and_saved(kind, tmp_path):
    pipe = fresh(kind)
    encoders = ["text_encoder", "text_encoder_2"] if kind == "sdxl" else ["text_encoder"]
    first = one(pipe)
    for encoder in encoders:
        pipe.load_lora_weights(of_text(3.0, encoder), adapter_name=encoder)
    pipe.set_adapters(encoders)
    loaded = one(pipe)
    with pytest.raises(SignFastError, match="the text_encoder has adapters: call fuse_lora"):
        pipe.save_pretrained(tmp_path / "new")  # it would write the adapter in the place of the encoder
    pipe.fuse_lora()
    assert relative_error(one(pipe), loaded) <= 1e-4
    pipe.unfuse_lora()
    assert relative_error(one(pipe), loaded) <= 1e-4
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert relative_error(one(pipe), loaded) <= 1e-4 and relative_error(loaded, first) > 1e-4
    pipe.save_pretrained(tmp_path / "new")
    assert relative_error(one(SiDPipeline.from_pretrained(tmp_path / "new")), loaded) <= 1e-4


NO_LAYER = {f"unet.none.to_q.lora_{letter}.weight": torch.zeros(4, 4) for letter in "AB"}
MISMATCHED = lora(1.0) | {f"unet.{TO_Q}.lora_A.weight": torch.zeros(4, 63)}
HALF_GOOD = lora(1.0) | of_text(1.0) | {f"text_encoder.{Q_PROJ}.lora_A.weight": torch.zeros(4, 15)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "the dict has no weights for this pipeline's unet and text_encoder"),
        ({name.replace("unet", "transformer"): t for name, t in lora(1.0).items()}, "has no weights for this"),
        (NO_LAYER, "cannot be loaded as a LoRA of this pipeline .*none"),
        (MISMATCHED, "cannot be loaded as a LoRA of this pipeline .*size mismatch for mid_block"),
        (HALF_GOOD, "cannot be loaded as a LoRA of this pipeline"),
    ],
    ids=["empty", "transformer", "layer", "width", "text"],
)
@pytest.mark.parametrize("loaded", [False, True], ids=["first", "second"])
def test_a_lora_that_does_not_fit_changes_nothing(tmp_path, weights, message, loaded):
    pipe = fresh("sd15")
    if loaded:
        pipe.load_lora_weights(lora(1.0), adapter_name="a")
        pipe.set_adapters("a", 0.25)
    before, keys = one(pipe), list(pipe.unet.state_dict())
    with pytest.raises(SignFastError, match=message) as caught:
        pipe.load_lora_weights(weights, adapter_name="b")
    assert "\n" not in str(caught.value)
    assert torch.equal(one(pipe), before) and list(pipe.unet.state_dict()) == keys
    assert [name for names in pipe.get_list_adapters().values() for name in names] == ["a"] * loaded
    pipe.load_lora_weights(lora(1.0), adapter_name="b")  # the name is free


def test_loras_without_peft(monkeypatch):
    pipe = fresh("sd15")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SignFastError, match=r"LoRAs need peft, which is not installed: pip install 'sign-fast\[diff"):
        pipe.load_lora_weights(lora(1.0))

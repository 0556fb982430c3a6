"""Pipelines' folders: written whole, read as data, refused in one line where damaged, hostile or of unequal parts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import SiDPipeline
from sign_fast.integrations.diffusers import saving as saving_module
from tests.golden_rules import normal
from tests.integrations.diffusers import tiny
from tests.integrations.diffusers.students import edit, refused, shown

UNET = "unet/diffusion_pytorch_model.safetensors"


# ---- written and read ----


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_round_trip(kind, tmp_path):
    with pytest.warns(UserWarning, match="is a StableDiffusion(XL)?Pipeline, not a distilled student"):
        pipe = SiDPipeline.from_pretrained(tiny.folder(kind), num_inference_steps=2, noise_type="ddim")
    pipe.save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SiDPipeline.from_pretrained(tmp_path / "new")
    assert (again.config.num_inference_steps, again.config.noise_type) == (2, "ddim")
    assert again.config.vae_scaling_factor == (0.13025 if kind == "sdxl" else 0.18215) and again.config.vae_pixels == 8
    assert np.array_equal(shown(again), shown(pipe))
    assert str(tmp_path.parent) not in (tmp_path / "new" / "model_index.json").read_text()
    assert sorted(os.listdir(tmp_path)) == ["new"]  # nothing temporary is left


def test_a_student_in_a_teachers_folder(student):
    unet = tiny.unet("sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = SiDPipeline.from_pretrained(tiny.folder("sd15"), unet=unet)
    assert pipe.unet is unet


def test_diffusers_own_pipeline_reads_the_parts(student):
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    plain = StableDiffusionPipeline.from_pretrained(student, **parts)
    assert plain("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)


def test_half_precision_shards_and_variants(student, tmp_path):
    pipe = SiDPipeline.from_pretrained(student, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "new", variant="bf16", max_shard_size="300KB")
    names = sorted(path.name for path in (tmp_path / "new" / "unet").iterdir())
    assert any("of-" in name for name in names) and any("index" in name for name in names)
    again = SiDPipeline.from_pretrained(tmp_path / "new", variant="bf16", torch_dtype=torch.bfloat16)
    assert again.unet.dtype == again.vae.dtype == torch.bfloat16 and np.array_equal(shown(again), shown(pipe))
    refused(tmp_path / "new", "holds no .*, though .*bf16.*: give its variant")


def test_an_older_pipeline_is_replaced_and_what_else_lies_there_kept(copied, tmp_path):
    (copied / "samples").mkdir()
    (copied / "samples" / "1.png").write_bytes(b"png")
    (copied / "unet" / "old.safetensors").write_bytes(b"old")
    pipe = SiDPipeline.from_pretrained(copied)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    pipe.save_pretrained(copied)
    assert (copied / "README.md").read_text() == "# A student\n"
    assert (copied / "samples" / "1.png").read_bytes() == b"png" and not (copied / "unet" / "old.safetensors").exists()
    assert torch.equal(SiDPipeline.from_pretrained(copied).unet.conv_out.bias, pipe.unet.conv_out.bias)
    pipe.save_pretrained(copied, card="# Another\n")
    assert (copied / "README.md").read_text() == "# Another\n"


def test_a_save_that_fails_leaves_the_older_one(copied, monkeypatch):
    pipe = SiDPipeline.from_pretrained(copied)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    def full(path, class_name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving_module, "_say_class", full)
    with pytest.raises(SignFastError, match="the disk is full"):
        pipe.save_pretrained(copied)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert os.listdir(copied.parent) == [copied.name]


def test_what_a_save_refuses(student, tmp_path):
    pipe = SiDPipeline.from_pretrained(student)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for folder, message in ((tmp_path / "mine", "holds other files"), (tmp_path / "mine" / "thesis.tex", "is a file")):
        with pytest.raises(SignFastError, match=message):
            pipe.save_pretrained(folder)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    for options in ({"safe_serialization": False}, {"push_to_hub": True}, {"use_flashpack": True}):
        with pytest.raises(SignFastError):
            pipe.save_pretrained(tmp_path / "new", **options)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe.load_lora_weights({f"{layer}.lora_A.weight": normal(7, 4, 64), f"{layer}.lora_B.weight": normal(8, 64, 4)})
    with pytest.raises(SignFastError, match=r"the unet has adapters: call fuse_lora\(\) and unload_lora_weights\(\)"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "new")
    assert np.abs(shown(SiDPipeline.from_pretrained(tmp_path / "new")) - shown(pipe)).max() <= 1e-5


class Renamed(UNet2DConditionModel):
    """A network whose class is another's meanwhile, as an accelerated one's."""


def test_classes_of_ours_are_saved_as_diffusers(student, tmp_path):
    pipe = SiDPipeline.from_pretrained(student)
    pipe.unet.__class__ = Renamed
    SiDPipeline(**pipe.components).save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "model_index.json").read_text())["unet"] == [
        "diffusers",
        "UNet2DConditionModel",
    ]
    assert json.loads((tmp_path / "new" / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert type(SiDPipeline.from_pretrained(tmp_path / "new").unet) is UNet2DConditionModel


# ---- missing and damaged ----


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model_index.json", "model_index.json is missing: name a whole pipeline folder"),
        ("unet", "unet is missing"),
        ("unet/config.json", "config.json is missing"),
        (UNET, "unet holds no diffusion_pytorch_model.safetensors: copy the pipeline again"),
        ("text_encoder/model.safetensors", "text_encoder holds no model.safetensors"),
        ("tokenizer", "tokenizer is missing"),
        ("tokenizer/tokenizer.json", "tokenizer holds neither tokenizer.json nor vocab.json and merges.txt"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
    ],
)
def test_missing_files(copied, gone, message):
    path = copied / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(copied, message)


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "none", "none is not there: name a pipeline's folder with model_index.json")
    refused(tmp_path / "file", "file is a file")
    refused("stabilityai/sdxl-turbo", "is not there")
    refused(tmp_path, "nothing is fetched", local_files_only=False)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\xff", "[" * 100_000], ids=range(6))
def test_damaged_json(copied, name, content):
    (copied / name).write_bytes(content.encode("latin-1"))
    refused(copied, f"{os.path.basename(name)} is (not readable as JSON|no table of settings).*: copy it again")


@pytest.mark.parametrize("name", [UNET, "text_encoder/model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights(copied, name, share):
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: int(share * len(data))])
    refused(copied, f"{name.split('/')[0]} cannot be loaded as .*: copy it again")


def test_weights_of_another_network(copied):
    tensors = load_file(copied / UNET)
    save_file({name: t for name, t in tensors.items() if not name.startswith("conv_out")}, copied / UNET)
    refused(copied, "unet lacks conv_out.bias, conv_out.weight: weights and configuration are of different networks")
    save_file({**tensors, "conv_out.bias": torch.zeros(7)}, copied / UNET)
    refused(copied, "unet cannot be loaded as UNet2DConditionModel")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": "ab"}, "unet cannot be loaded"),
        ({"down_block_types": ["NoBlock", "DownBlock2D"]}, "unet cannot be loaded"),
        ({"sample_size": None}, "sample_size must be a whole number above 0"),
        ({"quantization_config": {"load_in_4bit": True}}, "unet is quantized"),
        ({"in_channels": 9}, "unet cannot be loaded"),
        ({"class_embed_type": "timestep"}, "unet lacks class_embedding.linear_1.bias"),
    ],
)
def test_configurations_of_a_network(copied, changes, message):
    edit(copied / "unet" / "config.json", **changes)
    refused(copied, message)


def test_weights_that_a_network_would_leave_out(copied):
    config = copied / "vae" / "config.json"
    edit(config, use_quant_conv=False)
    refused(copied, "vae has no use for quant_conv.bias, quant_conv.weight: weights and configuration are of different")
    edit(config, use_quant_conv=True)
    edit(copied / "text_encoder" / "config.json", num_hidden_layers=1)
    refused(copied, "text_encoder has no use for .*layers.1.* and 29 more: weights and configuration are of different")


def test_names_of_weights_that_older_versions_wrote(student, copied):
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # as Stable Diffusion 1's VAE

    def renamed(name):
        for new, old in older.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        return name

    tensors = load_file(weights)
    assert set(map(renamed, tensors)) != set(tensors)
    save_file({renamed(name): t for name, t in tensors.items()}, weights)
    text = copied / "text_encoder" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(tiny.TOKENS)[None]}
    save_file(load_file(text) | positions, text, metadata={"format": "pt"})
    assert np.array_equal(shown(SiDPipeline.from_pretrained(copied)), shown(SiDPipeline.from_pretrained(student)))


@pytest.mark.parametrize("length", ["77", -5, 2])
def test_tokenizers_that_say_no_length(copied, length):
    edit(copied / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    refused(copied, f"a tokenizer has model_max_length {length!r}: it must be a whole number, 77 for CLIP")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_safetensors": False}, "would read pickles"),
        ({"torch_dtype": "half"}, "torch_dtype must be torch.bfloat16, torch.float16 or torch.float32, not 'half'"),
        (
            {"torch_dtype": torch.int8},
            "torch_dtype must be torch.bfloat16, torch.float16 or torch.float32, not torch.int8",
        ),
        ({"torch_dtype": torch.float16, "dtype": torch.float16}, "are one option"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 to 625"),
        ({"noise_type": "old"}, "noise_type must be fresh, fixed or ddim"),
        ({"device_map": "balanced"}, "from_pretrained takes no device_map"),
        ({"custom_pipeline": "mine"}, "from_pretrained takes no custom_pipeline"),
        ({"trust_remote_code": True}, "from_pretrained takes no trust_remote_code"),
    ],
    ids=["pickles", "dtype", "int8", "dtypes", "steps", "noise", "device_map", "custom", "trust"],
)
def test_options(student, options, message):
    refused(student, message, **options)


# ---- hostile ----


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt"])
def test_pickles_are_not_read(copied, tmp_path, name):
    (copied / UNET).unlink()
    (copied / "unet" / name).write_bytes(pickle.dumps(Harmful(str(tmp_path / "harm"))))
    refused(copied, f"holds {name} and no .*: a pickle can run code and is not read")
    assert not (tmp_path / "harm").exists()


def test_code_in_the_folder_does_not_run(copied, tmp_path):
    harm = f"open({str(tmp_path / 'harm')!r}, 'w')\n"
    for place in (".", "unet", "tokenizer", "scheduler"):
        for name in ("pipeline.py", "diffusers.py", "transformers.py", "modeling.py", "UNet2DConditionModel.py"):
            (copied / place / name).write_text(harm)
    edit(copied / "unet" / "config.json", auto_map={"AutoModel": "modeling.Model"})
    edit(copied / "text_encoder" / "config.json", auto_map={"AutoModel": "modeling.Model"})
    edit(copied / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Model", None]})
    SiDPipeline.from_pretrained(copied)
    for value in (["pipeline", "MyPipeline"], {"a": 1}, None):
        edit(copied / "model_index.json", _class_name=value)
        refused(copied, "as its pipeline, code of its own, which is never run")
    edit(copied / "model_index.json", _class_name="SiDPipeline", unet=["modeling", "UNet2DConditionModel"])
    refused(copied, "its unet is modeling.UNet2DConditionModel, which is not supported")
    edit(copied / "model_index.json", unet=["os", "system"])
    refused(copied, "its unet is os.system, which is not supported")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "model.bin"]
)
def test_shards_outside_of_the_folder(copied, name):
    (copied / UNET).rename(copied.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(copied, "which is no safetensors file of its folder: do not trust it")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("name", ["weights.bin", "../../secret.safetensors"])
def test_an_index_beside_a_whole_file(copied, part, name):
    """diffusers reads what the index names, and a pickle where it names one."""
    (weights,) = (copied / part).glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors, copied.parent / "secret.safetensors")
    torch.save(tensors, copied / part / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    refused(copied, "which is no safetensors file of its folder: do not trust it")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation", "kernels-community/flash-attn"),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_configurations_that_lead_elsewhere(copied, key, value):
    shutil.copy(copied / "text_encoder" / "model.safetensors", copied / "text_encoder" / "other.safetensors")
    edit(copied / "text_encoder" / "config.json", **{key: value})
    refused(copied, f"text_encoder has {key}='{value}', which leads elsewhere: do not trust it")


@pytest.mark.parametrize("weight_map", [None, {}, {"a": 1}, ["a"]], ids=range(4))
def test_damaged_shards(copied, weight_map):
    (copied / UNET).unlink()
    index = copied / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(copied, "names no files of weights")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "part.safetensors"}}))
    refused(copied, "part.safetensors is missing")


def test_an_adapter_would_fetch_its_network(copied):
    (copied / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    refused(copied, "text_encoder is an adapter, whose network would be fetched")

"""LoRA before and after accelerate: loaded, weighted, fused, unloaded, with plain diffusers' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sign_fast.integrations.diffusers import accelerate, restore
from tests.integrations.diffusers import small_models as small
from tests.integrations.diffusers.small_models import image, pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "conv_shortcut", "time_emb_proj"]
CLOSE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}


def _call(net: Any, **named: Any) -> torch.Tensor:
    with torch.no_grad():
        return small.call_unet(net, torch.float64, **named)


def _adapter(net: UNet2DConditionModel, name: str, seed: int) -> None:
    net.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(net.named_parameters()):
        if f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1


def _network() -> UNet2DConditionModel:
    return small.copy_in(small.unet(small.SHALLOW), torch.float64)


def _life(net: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The outputs of an adapter's life; in float64, where ours is plain torch, roundings play no part."""
    found = {"none": _call(net)}
    _adapter(net, "one", 1)
    found["one"] = _call(net)
    _adapter(net, "two", 2)
    net.set_adapters(["one", "two"], [0.3, 0.8])
    found["both"] = _call(net)
    net.set_adapters("one")
    found["scaled"] = _call(net, cross_attention_kwargs={"scale": 0.5})
    net.disable_adapters()
    found["disabled"] = _call(net)
    net.enable_adapters()
    net.fuse_lora(lora_scale=0.7)
    found["fused"] = _call(net)
    net.unfuse_lora()
    found["unfused"] = _call(net)
    net.delete_adapters("two")
    net.unload_lora()
    found["unloaded"] = _call(net)
    return found


def test_an_adapters_life_after_accelerate():
    want = _life(_network())
    net = _network()
    a = accelerate(net)
    sites = len(a.changed)
    got = _life(net)
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], **CLOSE, msg=key)
    different = ["none", "one", "both", "scaled", "fused"]
    assert not any(torch.allclose(want[x], want[y]) for x in different for y in different if x < y)
    assert len(a.changed) == sites
    restore(net)
    plain = _network()
    assert {n: type(m) for n, m in net.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert {n: p.stride() for n, p in net.named_parameters()} == {n: p.stride() for n, p in plain.named_parameters()}


def test_accelerate_and_restore_around_an_adapter():
    net = _network()
    _adapter(net, "one", 1)
    want = _call(net)
    a = accelerate(net)
    assert len([s for s in a.changed if s.kind == "residual sum"]) == 12
    torch.testing.assert_close(_call(net), want, **CLOSE)
    net.fuse_lora()
    torch.testing.assert_close(_call(net), want, **CLOSE)
    net.unfuse_lora()
    restore(net)
    torch.testing.assert_close(_call(net), want, **CLOSE)
    assert not any("sign_fast" in type(m).__module__ for m in net.modules())


def test_restore_while_an_adapter_is_there():
    """peft makes a convolution's adapter of the convolution's own class."""
    net = _network()
    accelerate(net)
    _adapter(net, "one", 1)
    want = _call(net)
    restore(net)
    assert not any("sign_fast" in type(m).__module__ for m in net.modules())
    torch.testing.assert_close(_call(net), want, **CLOSE)


def test_an_adapter_learns_as_without():
    def gradients(speed: bool) -> dict[str, torch.Tensor]:
        net = _network().requires_grad_(False)
        if speed:
            accelerate(net)
        _adapter(net, "one", 1)
        small.call_unet(net, torch.float64).square().sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}

    want, got = gradients(False), gradients(True)
    assert want.keys() == got.keys() and len(want) > 50
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-8 * gradient.abs().max().item())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pipelines_lora_from_a_state_dict(when):
    donor = small.unet(small.SHALLOW)
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), adapter_name="x")
    state = {f"unet.{key}": v for key, v in get_peft_model_state_dict(donor, adapter_name="x").items()}

    def images(speed: bool) -> dict[str, torch.Tensor]:
        pipe = pipeline()
        if speed and when == "before":
            accelerate(pipe)
        found = {"none": image(pipe)}
        pipe.load_lora_weights(dict(state), adapter_name="x")
        if speed and when == "after":
            accelerate(pipe)
        found["loaded"] = image(pipe)
        pipe.set_adapters("x", 0.5)
        found["weighted"] = image(pipe)
        pipe.fuse_lora()
        found["fused"] = image(pipe)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        found["unloaded"] = image(pipe)
        return found

    want, got = images(False), images(True)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-4, msg=key)
    assert not torch.allclose(want["none"], want["loaded"], atol=1e-3)

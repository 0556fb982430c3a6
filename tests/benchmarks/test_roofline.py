"""The network's work, counted by hand where that is possible, and the fraction of the roofline."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from sign_fast.models import create


def _by_hand(net):
    """Multiply-adds and elements moved of an unconditional DDPM++ network, from its layers' attributes alone."""
    unet, multiplied, moved = net.model, 0, 0

    def conv(layer, size):
        nonlocal multiplied, moved
        out = size * 2 if layer.up else size // 2 if layer.down else size
        channels = layer.in_channels
        if layer.up or layer.down:
            taps = layer.resample_filter.numel()
            multiplied += channels * taps * min(size, out) ** 2  # transposed: each input pixel, taps times
        multiplied += layer.weight.numel() * out**2 if layer.weight is not None else 0
        moved += layer.in_channels * size**2 + layer.out_channels * out**2
        return out

    def block(layer, size):
        nonlocal multiplied, moved
        c_in, c_out = layer.norm0.weight.numel(), layer.norm1.weight.numel()
        moved += 2 * c_in * size**2
        out = conv(layer.conv0, size)
        multiplied += layer.affine.weight.numel()
        moved += 2 * c_out * out**2
        conv(layer.conv1, out)
        moved += c_out * out**2  # the residual
        if layer.skip is not None:
            conv(layer.skip, size)
        if layer.num_heads:
            pixels = out**2
            moved += 2 * c_out * pixels + 4 * c_out * pixels + c_out * pixels  # norm, attention, residual
            conv(layer.qkv, out)
            conv(layer.proj, out)
            multiplied += 2 * pixels**2 * c_out
        return out

    size = net.img_resolution
    for name, layer in unet.enc.items():
        size = conv(layer, size) if name.endswith("_conv") else block(layer, size)
    for name, layer in unet.dec.items():
        if "aux_norm" in name:
            moved += 2 * layer.weight.numel() * size**2
        else:
            size = conv(layer, size) if "aux_conv" in name else block(layer, size)
    multiplied += unet.map_layer0.weight.numel() + unet.map_layer1.weight.numel()
    return multiplied, moved


@pytest.mark.parametrize("preset", ["digits-uncond", "cifar10-uncond-vp"])
def test_work_is_what_the_layers_say(preset):
    with torch.device("meta"):
        net = create(preset).eval()
    work = roofline.count(net, torch.float32)
    multiplied, moved = _by_hand(net)
    assert work.flops == 2 * multiplied
    assert work.activations == moved
    assert work.weights == sum(p.numel() for p in net.parameters())
    assert work.bytes(3) == 4 * (work.weights + 3 * moved)
    assert roofline.count(net, torch.bfloat16).bytes(3) == work.bytes(3) / 2


@pytest.mark.parametrize("preset", ["cifar10-cond-ve", "imagenet64-cond-adm"])
def test_every_kind_of_network_is_counted(preset):
    with torch.device("meta"):
        work = roofline.count(create(preset).eval(), torch.bfloat16)
    assert work.flops > 1e10 and work.activations > 1e6


def test_the_network_is_as_it_was():
    net = create("digits-uncond").eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    roofline.count(net, torch.float32)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_slower_of_the_ceilings_bounds_the_time():
    work = roofline.Work(flops=100.0, activations=10, weights=1000, itemsize=2)
    ceilings = roofline.Ceilings(flop_s=50.0, byte_s=1010.0)
    assert ceilings.attainable(work, 1) == 2.0  # the weights: (1000 + 10)·2 / 1010
    assert ceilings.attainable(work, 10) == 20.0  # the FLOPs: 10·100 / 50
    columns = ceilings.columns(work, 10, calls=3, ms_per_image=12_000.0)
    assert columns["roofline"] == pytest.approx(3 * 20 / 120)
    assert columns["gflop_per_call"] == 1e-6 and columns["mb_per_call"] == 2200e-6


def test_ceilings_are_measured_once(monkeypatch):
    monkeypatch.setattr(roofline, "_CPU_SIZES", (64,))
    monkeypatch.setattr(roofline, "_CPU_ELEMENTS", 1 << 12)
    monkeypatch.setattr(roofline, "_CPU_IMAGES", 1)
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    roofline.measure.cache_clear()
    first = roofline.measure("cpu", torch.float32)
    assert first.flop_s > 0 and first.byte_s > 0
    assert roofline.measure("cpu", torch.float32) is first
    roofline.measure.cache_clear()

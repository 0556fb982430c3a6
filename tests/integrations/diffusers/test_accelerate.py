"""accelerate's numbers: outputs and every gradient as near to float64's as plain diffusers' (rule 1)."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from packaging.version import Version
from torch.utils.checkpoint import checkpoint

from sign_fast.integrations.diffusers import accelerate, restore
from sign_fast.kernels.dispatch import taken
from tests.integrations.diffusers import small_models as small
from tests.oracle import assert_close

CASES: dict[str, tuple[Any, Any]] = {
    "sd15": (lambda: small.unet(small.SD15), small.call_unet),
    "sd2": (lambda: small.unet(small.SD2), small.call_unet),
    "sdxl": (lambda: small.unet(small.SDXL), small.call_unet),
    "scale_shift": (lambda: small.unet(small.SCALE_SHIFT), small.call_unet),
    "ddpm": (lambda: small.unconditional(small.DDPM), small.call_unconditional),
    "score_sde": (lambda: small.unconditional(small.SCORE_SDE), small.call_unconditional),
    "ncsnpp": (lambda: small.unconditional(small.NCSNPP), small.call_unconditional),
    "autoencoder": (small.autoencoder, small.call_autoencoder),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAYS = {f"{d}-{f}": (DTYPES[d], f == "channels_last") for d in DTYPES for f in ("channels_last", "contiguous")}
del WAYS["fp16-contiguous"]


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A network, its call, and float64's output."""
    if request.param == "ncsnpp" and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip("this diffusers' FIR filters take float32 only")
    make, call = CASES[request.param]
    net = make()
    with torch.no_grad():
        return request.param, net, call, call(small.copy_in(net, torch.float64), torch.float64)


@pytest.mark.parametrize(("dtype", "channels_last"), WAYS.values(), ids=WAYS)
def test_outputs_are_as_near_to_float64_as_plain_diffusers(case, dtype, channels_last):
    name, net, call, want = case
    ours = small.copy_in(net, dtype)
    with torch.no_grad():
        plain = call(ours, dtype)
        taken.clear()
        accelerate(ours, channels_last=channels_last)
        got = call(ours, dtype)
    assert_close(got, want, plain, name)
    assert taken["group_norm_silu", "cpp"] and taken["residual_group_norm_silu", "cpp"]
    assert taken["attention", "flash"]
    assert all(way in ("cpp", "flash") for _, way in taken), taken
    assert got.is_contiguous(memory_format=torch.channels_last) or not channels_last


def test_every_gradient_is_as_near_to_float64_as_plain_diffusers(case):
    _, net, call, _ = case

    def gradients(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        channels = 4 if isinstance(model, UNet2DConditionModel) else 3
        x = small.draw(2, channels, 16, 16, seed=1).to(dtype).requires_grad_()
        y = call(model, dtype, x)
        weights = small.draw(*y.shape, seed=5).to(dtype)
        named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad((y * weights).sum(), [x, *named.values()], allow_unused=True)
        return {key: g for key, g in zip(["input", *named], found, strict=True) if g is not None}

    want = gradients(small.copy_in(net, torch.float64), torch.float64)
    ours = small.copy_in(net, torch.float32)
    plain = gradients(ours, torch.float32)
    accelerate(ours)
    got = gradients(ours, torch.float32)
    assert got.keys() == want.keys() == plain.keys() and len(got) > 50
    # a bias that the next norm takes away has no gradient but for roundings, as large as other layers'
    largest = max(map(small.rms, want.values()))
    size = {key: small.rms(g) if small.rms(g) > 1e-9 * largest else largest for key, g in want.items()}
    before = {key: small.rms(plain[key] - want[key]) / size[key] for key in want}
    after = {key: small.rms(got[key] - want[key]) / size[key] for key in want}
    # the roundings of one convolution's many sums differ with its algorithm: rule 1 for all and for the worst
    assert sum(after.values()) <= 2 * sum(before.values())
    worst = max(after, key=lambda key: after[key])
    assert after[worst] <= 2 * max(before.values()), worst

    ours = small.copy_in(net, torch.bfloat16)  # roundings of what is stored outweigh the sums': rule 1 for each
    plain = gradients(ours, torch.bfloat16)
    accelerate(ours)
    got = gradients(ours, torch.bfloat16)
    for key in want:
        if size[key] is not largest:
            assert_close(got[key], want[key], plain[key], key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(dtype):
    net = small.unet(small.SD15)
    with torch.no_grad():
        want = small.call_unet(small.copy_in(net, torch.float64), torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            plain = small.call_unet(net, dtype)
            accelerate(net)
            got = small.call_unet(net, dtype)
    assert_close(got.float(), want, plain.float().bfloat16().float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    net = small.unet(small.SD15).train()
    x = small.draw(2, 4, 16, 16, seed=1).requires_grad_()

    def gradients() -> list[torch.Tensor]:
        y = small.call_unet(net, torch.float32, x)
        return list(torch.autograd.grad(y.square().sum(), [x, net.conv_in.weight, net.conv_out.weight]))

    want = gradients()
    accelerate(net)
    without = gradients()
    net.enable_gradient_checkpointing(lambda *a: checkpoint(*a, use_reentrant=reentrant))
    if reentrant:  # such a checkpoint has no torch.autograd.grad
        y = small.call_unet(net, torch.float32, x)
        y.square().sum().backward()
        got = [x.grad, net.conv_in.weight.grad, net.conv_out.weight.grad]
    else:
        got = gradients()
    for a, b, c in zip(got, without, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4 * c.abs().max().item())


def test_what_else_diffusers_unets_do_is_plain_diffusers():
    net = small.unet(small.SD15 | {"attention_type": "gated"})
    mask = torch.ones(2, 7)
    mask[:, 4:] = 0
    boxes = {"boxes": small.draw(2, 3, 4, seed=7), "masks": torch.ones(2, 3)}
    boxes |= {"positive_embeddings": small.draw(2, 3, 24, seed=8)}

    def outputs() -> dict[str, torch.Tensor]:
        found = {"plain": small.call_unet(net, torch.float64)}
        gligen = {key: value.double() for key, value in boxes.items()}
        found["gligen"] = small.call_unet(net, torch.float64, cross_attention_kwargs={"gligen": gligen})
        found["mask"] = small.call_unet(net, torch.float64, encoder_attention_mask=mask.double())
        net.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        found["freeu"] = small.call_unet(net, torch.float64)
        net.disable_freeu()
        net.set_attention_slice(1)
        found["sliced"] = small.call_unet(net, torch.float64)
        net.set_attn_processor(AttnProcessor2_0())
        net.fuse_qkv_projections()
        found["fused"] = small.call_unet(net, torch.float64)
        net.unfuse_qkv_projections()
        residuals = [small.draw(2, c, s, s, seed=9).double() for c, s in ((32, 16),) * 3 + ((32, 8), (64, 8), (64, 8))]
        found["controlnet"] = small.call_unet(
            net,
            torch.float64,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=residuals[-1],
        )
        found["adapter"] = small.call_unet(
            net, torch.float64, down_intrablock_additional_residuals=[residuals[0], residuals[5]]
        )
        return found

    # in float64 both are plain torch: not a matter of roundings
    net = small.copy_in(net, torch.float64)
    with torch.no_grad():
        want = outputs()
        accelerate(net)
        got = outputs()
        restore(net)
        back = outputs()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-9, msg=key)
        assert torch.equal(back[key], want[key]), key
    for key in ("mask", "freeu", "gligen", "controlnet", "adapter"):
        assert not torch.allclose(want["plain"], want[key]), key


def test_what_else_diffusers_autoencoders_do_is_plain_diffusers():
    net = small.copy_in(small.autoencoder(), torch.float64)
    x = small.draw(2, 3, 24, 40, seed=1)

    def outputs() -> dict[str, torch.Tensor]:
        found = {"plain": small.call_autoencoder(net, torch.float64, x)}
        net.enable_slicing()
        found["sliced"] = small.call_autoencoder(net, torch.float64, x)
        net.disable_slicing()
        net.enable_tiling()
        net.tile_sample_min_size, net.tile_latent_min_size = 16, 8
        found["tiled"] = small.call_autoencoder(net, torch.float64, x)
        net.disable_tiling()
        net.fuse_qkv_projections()
        found["fused"] = small.call_autoencoder(net, torch.float64, x)
        net.unfuse_qkv_projections()
        return found

    with torch.no_grad():
        want = outputs()
        accelerate(net)
        got = outputs()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-9, msg=key)
    assert not torch.allclose(want["plain"], want["tiled"])


def test_a_sum_changed_in_place_is_normalised_anew():
    """The norm that a residual sum brings along is of the sum as it was."""
    net = small.copy_in(small.unet(small.SD15), torch.float64)
    first = net.down_blocks[0].resnets[0]
    handle = first.register_forward_hook(lambda module, given, output: output.mul_(3))
    with torch.no_grad():
        want = small.call_unet(net, torch.float64)
        accelerate(net)
        got = small.call_unet(net, torch.float64)
        handle.remove()
        other = small.call_unet(net, torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(other, want)


def test_a_sum_keeps_its_norm_no_longer_than_needed():
    net = small.unet(small.SD15)
    accelerate(net)
    outputs = []
    for block in net.down_blocks:
        for module in block.resnets:
            module.register_forward_hook(lambda module, given, output: outputs.append(output) or None)
    with torch.no_grad():
        small.call_unet(net, torch.float32)
    assert len(outputs) == 4 and not any(vars(r) for r in outputs)


def test_inference_mode_and_func_transforms():
    net = small.unet(small.SD15).requires_grad_(False)
    x = small.draw(2, 4, 16, 16, seed=1)

    def derivative() -> torch.Tensor:
        return torch.func.grad(lambda v: small.call_unet(net, torch.float32, v).square().sum())(x)

    with torch.no_grad():
        want = small.call_unet(net, torch.float32)
    plain = derivative()
    accelerate(net)
    with torch.inference_mode():
        torch.testing.assert_close(small.call_unet(net, torch.float32), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(derivative(), plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())

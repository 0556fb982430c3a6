"""accelerate of whole pipelines, and of compiled networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch._dynamo.testing import CompileCounterWithBackend

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import accelerate, restore
from sign_fast.kernels import dispatch
from tests.integrations.diffusers import small_models as small
from tests.integrations.diffusers.small_models import image, pipeline


def test_a_pipelines_images_and_report(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    pipe = pipeline()
    want = image(pipe)
    a = accelerate(pipe)
    torch.testing.assert_close(image(pipe), want, rtol=1e-4, atol=1e-4)
    assert {s.name.partition(".")[0] for s in a.changed} == {"unet", "vae"}
    others = [s for s in a.left if s.kind == "CLIPTextModel"]
    assert [(s.name, s.reason) for s in others] == [
        ("text_encoder", "only UNet2DModel, UNet2DConditionModel, AutoencoderKL are supported")
    ]
    pipe.vae.enable_slicing()
    pipe.enable_attention_slicing()
    with pytest.warns(UserWarning, match="its processor is SlicedAttnProcessor"):
        torch.testing.assert_close(image(pipe), want, rtol=1e-4, atol=1e-4)
    pipe.disable_attention_slicing()
    a.restore()
    assert not any("sign_fast" in type(m).__module__ for part in (pipe.unet, pipe.vae) for m in part.modules())
    assert not a.changed or {s.kind for s in a.changed} == {"convolution weight"}


def test_a_pipeline_without_anything_of_ours_is_refused():
    pipe = pipeline()
    pipe.unet = pipe.vae = None
    with pytest.raises(SignFastError, match="a StableDiffusionPipeline of CLIPTextModel has nothing to accelerate"):
        accelerate(pipe)


def test_an_ip_adapters_processors_run_as_they_are(monkeypatch):
    net = small.unet(small.SD15)
    accelerate(net)
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    processors = {}
    for name, processor in net.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = processor
        else:
            width = net.config.block_out_channels[0]
            width = {"mid_block": 64, "up_blocks.0": 64}.get(name[: 9 if name[0] == "m" else 11], width)
            torch.manual_seed(1)
            processors[name] = IPAdapterAttnProcessor2_0(width, cross_attention_dim=24, num_tokens=(2,))
    net.set_attn_processor(processors)
    other = copy.deepcopy(net)
    restore(other)

    def call(model: Any) -> torch.Tensor:
        text = (small.draw(2, 7, 24, seed=2), [small.draw(2, 1, 2, 24, seed=6)])
        with torch.no_grad():
            masks = {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}
            x, times = small.draw(2, 4, 16, 16, seed=1), torch.tensor([3, 500])
            return model(x, times, text, cross_attention_kwargs=masks).sample

    monkeypatch.setenv("SIGN_FAST_STRICT", "1")  # the masks are not for the other attentions, which go on as they did
    torch.testing.assert_close(call(net), call(other), rtol=1e-4, atol=1e-4)


# the middle has a transformer: tracing takes longest, of plain diffusers as well
TRACED = small.SD15 | {
    "layers_per_block": 1,
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def test_compiled_without_a_break_and_with_other_batches():
    net = small.unet(TRACED)
    net64 = small.copy_in(net, torch.float64)
    accelerate(net)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 4):
            x = small.draw(batch, 4, 16, 16, seed=1)
            got = small.call_unet(compiled, torch.float32, x)
            torch.testing.assert_close(got.double(), small.call_unet(net64, torch.float64, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_compiled_gradients():
    owner = small.unet(TRACED)
    accelerate(owner)
    net = owner.mid_block  # a residual block, a transformer, a residual block
    x, emb, text = small.draw(2, 16, 8, 8, seed=1), small.draw(2, 64, seed=2), small.draw(2, 7, 24, seed=3)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients(model: Any) -> list[torch.Tensor]:
        y = model(x, emb, encoder_hidden_states=text)
        return list(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]))

    want = gradients(net)
    torch._dynamo.reset()
    got = gradients(torch.compile(net, fullgraph=True, backend="aot_eager"))
    largest = max(g.abs().max().item() for g in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


def test_restoring_a_compiled_network_compiles_anew():
    one = {key: small.AUTOENCODER[key][:1] for key in ("block_out_channels", "down_block_types", "up_block_types")}
    a = accelerate(owner := small.fill(AutoencoderKL(**small.AUTOENCODER | one)))
    net = owner.decoder
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        compiled(small.draw(2, 4, 8, 8))
        a.restore()
        torch.testing.assert_close(compiled(small.draw(2, 4, 8, 8)), net(small.draw(2, 4, 8, 8)))
    assert counter.frame_count == 2

"""What accelerate leaves as it was, restores, reports and refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import accelerate, restore, versions
from sign_fast.kernels.dispatch import SlowPathError, SlowPathWarning
from tests.integrations.diffusers import small_models as small


def _facts(net: nn.Module) -> dict[str, object]:
    """All that accelerate may change, and what it may not."""
    facts: dict[str, object] = {name: (type(m), tuple(sorted(vars(m)))) for name, m in net.named_modules()}
    for name, p in net.named_parameters():
        facts[f"{name}."] = (id(p), p.stride(), hash(p.data.contiguous().numpy().tobytes()))
    facts["processors"] = {name: id(p) for name, p in getattr(net, "attn_processors", {}).items()}
    return facts


@pytest.mark.parametrize("make", [lambda: small.unet(small.SD2), small.autoencoder], ids=["unet", "autoencoder"])
@pytest.mark.parametrize("how", ["object", "function", "twice", "copy", "pickle"])
def test_restore_gives_back_classes_processors_and_strides(make, how):
    net = make()
    net.conv_norm_out = getattr(net, "conv_norm_out", None)
    weight = next(p for p in net.parameters() if p.ndim == 4 and p.shape[2] == 3)
    weight.data = weight.data.transpose(2, 3).contiguous().transpose(2, 3)  # strides of neither format
    before = _facts(net)
    acceleration = accelerate(net)
    assert _facts(net) != before
    if how == "twice":
        once = _facts(net)
        accelerate(net)
        assert _facts(net) == once
    if how == "copy":
        net = copy.deepcopy(net)
    if how == "pickle":
        net = pickle.loads(pickle.dumps(net))
    if how == "object":
        acceleration.restore()
    else:
        restore(net)
    after = _facts(net)
    if how in ("copy", "pickle"):  # whose objects are others
        ids = [name for name in before if name.endswith(".")]
        before |= {name: before[name][1:] for name in ids} | {"processors": None}
        after |= {name: after[name][1:] for name in ids} | {"processors": None}
    assert after == before
    assert not any("sign_fast" in type(m).__module__ for m in net.modules())


def test_names_state_and_types_stay():
    net = small.unet(small.SD15)
    names, keys = [name for name, _ in net.named_modules()], list(net.state_dict())
    kinds = {name: type(m).__name__ for name, m in net.named_modules()}
    accelerate(net)
    assert [name for name, _ in net.named_modules()] == names and list(net.state_dict()) == keys
    # by which accelerate and diffusers look for classes
    renamed = {name: type(m).__name__ for name, m in net.named_modules() if type(m).__name__ != kinds[name]}
    assert renamed == {"conv_norm_out": "GroupNormSiLU"}
    assert isinstance(net.down_blocks[0].resnets[0], ResnetBlock2D)
    assert isinstance(net.down_blocks[0].attentions[0].transformer_blocks[0].attn1, Attention)
    assert isinstance(net.conv_norm_out, nn.GroupNorm)


def test_copies_and_saved_folders_compute_the_same(tmp_path):
    net = small.unet(small.SD15)
    accelerate(net)
    with torch.no_grad():
        want = small.call_unet(net, torch.float32)
        assert torch.equal(small.call_unet(copy.deepcopy(net), torch.float32), want)
        net.save_pretrained(tmp_path)
        again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
        assert not any("sign_fast" in type(m).__module__ for m in again.modules())
        restore(net)
        assert torch.equal(small.call_unet(again, torch.float32), small.call_unet(net, torch.float32))


def test_report_counts_every_site():
    net = small.unet(small.SD15)
    a = accelerate(net)
    norms = [name for name, m in net.named_modules() if isinstance(m, nn.GroupNorm)]
    assert sorted(s.name for s in a.changed if s.kind.startswith("GroupNorm")) == sorted(norms)
    silu = [s.name for s in a.changed if s.kind == "GroupNorm–SiLU"]
    blocks = [name for name, m in net.named_modules() if isinstance(m, ResnetBlock2D)]
    assert sorted(silu) == sorted([f"{b}.norm{i}" for b in blocks for i in (1, 2)] + ["conv_norm_out"])
    attentions = {name: m for name, m in net.named_modules() if isinstance(m, Attention)}
    changed = {s.name for s in a.changed if s.kind == "attention"}
    left = {s.name: s.reason for s in a.left if s.kind == "attention"}
    assert changed == {name for name in attentions if name.endswith("attn1")} and changed | left.keys() == {*attentions}
    assert all("text's tokens" in reason for reason in left.values())
    weights = [name for name, p in net.named_parameters() if p.ndim == 4]
    assert [s.name for s in a.changed if s.kind == "convolution weight"] == weights
    table = str(a)
    assert (
        "changed:" in table
        and "left:" in table
        and "GroupNorm–SiLU" in table
        and max(map(len, table.split("\n"))) < 200
    )
    a.restore()
    assert not [s for s in a.changed if s.kind.startswith("GroupNorm")]
    assert repr(a).startswith("Acceleration(")


def test_what_is_told_to_stay_stays():
    net = small.unet(small.SD15)
    strides = {name: p.stride() for name, p in net.named_parameters()}
    a = accelerate(net, attention=False, channels_last=False)
    assert strides == {name: p.stride() for name, p in net.named_parameters()}
    assert not [s for s in a.changed if s.kind == "attention"]
    assert {s.reason for s in a.left if s.kind == "convolution weight"} == {
        "its weight is not in channels_last; call accelerate again with channels_last=True"
    }
    assert any("told to leave" in s.reason for s in a.left)


def test_what_does_not_fit_is_left_with_its_reason():
    net = small.unet(small.SD15 | {"act_fn": "gelu"})
    a = accelerate(net)
    reasons = {s.name: s.reason for s in a.left}
    assert reasons["down_blocks.0.resnets.0"] == "its activation is not SiLU"
    assert "conv_norm_out" not in reasons and type(net.conv_act) is nn.GELU
    with torch.no_grad():
        got = small.call_unet(net, torch.float32)
        a.restore()
        torch.testing.assert_close(got, small.call_unet(net, torch.float32), rtol=1e-4, atol=1e-4)

    net = small.unet(small.SD15)
    block = net.mid_block.resnets[0]
    block.forward = lambda *given, f=block.forward: f(*given)
    net.mid_block.resnets[1].__class__ = type("Mine", (ResnetBlock2D,), {})
    a = accelerate(net)
    reasons = {s.name: s.reason for s in a.left}
    assert "overridden on the instance" in reasons["mid_block.resnets.0"]
    assert "derived from diffusers'" in reasons["mid_block.resnets.1"]

    net = small.autoencoder()
    net.decoder.mid_block.attentions[0].set_processor(AttnProcessor())
    a = accelerate(net)
    assert "processor is AttnProcessor" in {s.name: s.reason for s in a.left}["decoder.mid_block.attentions.0"]


def test_all_blocks_of_an_autoencoder_are_changed():
    """Those of the decoder say that their time embedding is of another kind, and have none."""
    net = small.autoencoder()
    kinds = {block.time_embedding_norm for block in net.decoder.modules() if isinstance(block, ResnetBlock2D)}
    assert kinds - {"default", "scale_shift"}
    a = accelerate(net)
    assert not [site for site in a.left if "resnets" in site.name and "GroupNorm" in site.kind]


def test_a_processor_set_later_runs_and_is_reported(monkeypatch):
    net = small.unet(small.SD15)
    with torch.no_grad():
        want = small.call_unet(net, torch.float32)
    a = accelerate(net)
    calls = []

    class Mine(AttnProcessor2_0):
        def __call__(self, *given, **named):
            calls.append(0)
            return super().__call__(*given, **named)

    net.set_attn_processor(Mine())
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert "Mine" in {s.name: s.reason for s in a.left}[name]
    with torch.no_grad(), pytest.warns(SlowPathWarning, match="its processor is Mine"):
        torch.testing.assert_close(small.call_unet(net, torch.float32), want, rtol=1e-4, atol=1e-4)
    assert len(calls) == 12
    monkeypatch.setenv("SIGN_FAST_STRICT", "1")
    with torch.no_grad(), pytest.raises(SlowPathError, match="its processor is Mine"):
        small.call_unet(net, torch.float32)
    net.set_attn_processor(AttnProcessor2_0())
    assert name in {s.name for s in a.changed}
    with torch.no_grad():
        small.call_unet(net, torch.float32)


@pytest.mark.filterwarnings("ignore::sign_fast.kernels.dispatch.SlowPathWarning")
def test_hooks_run():
    net = small.unet(small.SD15)
    accelerate(net)
    seen = []
    block = net.down_blocks[0].resnets[0]
    for module in (block, block.norm1, block.norm2, block.conv1, net.conv_norm_out, net.conv_act):
        module.register_forward_hook(lambda module, given, output: seen.append(module) or None)
    with torch.no_grad():
        small.call_unet(net, torch.float32)
    assert seen == [block.norm1, block.conv1, block.norm2, block, net.conv_norm_out, net.conv_act]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["sequential", "model", "group"])
def test_offloading_hooks(when, how):
    accelerate_hooks = pytest.importorskip("accelerate")
    net = small.unet(small.SD15)
    with torch.no_grad():
        want = small.call_unet(net, torch.float32)

    def hook() -> None:
        if how == "sequential":
            accelerate_hooks.cpu_offload(net, execution_device=torch.device("cpu"), offload_buffers=True)
        elif how == "model":
            accelerate_hooks.cpu_offload_with_hook(net, execution_device=torch.device("cpu"))
        else:
            from diffusers.hooks import apply_layerwise_casting

            apply_layerwise_casting(net, storage_dtype=torch.float64, compute_dtype=torch.float32)

    if when == "before":
        hook()
    a = accelerate(net)
    if when == "after":
        hook()
    with torch.no_grad():
        torch.testing.assert_close(small.call_unet(net, torch.float32), want, rtol=1e-4, atol=1e-4)
        assert [s for s in a.changed if s.kind == "GroupNorm–SiLU"]
        a.restore()
        torch.testing.assert_close(small.call_unet(net, torch.float32), want, rtol=1e-4, atol=1e-4)
    held = [v for m in net.modules() for v in vars(m).values() if hasattr(v, "__func__")]
    assert not any("sign_fast" in f.__func__.__module__ for f in held)


def test_modules_with_networks_inside():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = small.unet(small.SD15)

    holder = Holder()
    a = accelerate(holder)
    assert all(s.name.startswith("module.") for s in a.changed) and a.changed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: nn.Linear(2, 2), "a Linear has nothing to accelerate: UNet2DModel, UNet2DConditionModel"),
        (lambda: diffusers.SD3Transformer2DModel(num_layers=1, attention_head_dim=8), "has nothing to accelerate"),
        (lambda: "runwayml/stable-diffusion-v1-5", "a diffusers pipeline or model is needed, not a str"),
        (lambda: torch.compile(small.unet(small.SD15)), "accelerate first, then torch.compile"),
    ],
    ids=["linear", "transformer", "string", "compiled"],
)
def test_others_are_refused_in_one_line(given, message):
    with pytest.raises(SignFastError) as told:
        accelerate(given())
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_network_compiled_in_place_is_refused():
    net = small.unet(small.SD15)
    net.compile()
    with pytest.raises(SignFastError, match="accelerate first, then"):
        accelerate(net)


def test_other_versions_warn_once(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.setattr(diffusers, "__version__", "0.99.1")
    with pytest.warns(UserWarning, match=r"diffusers 0\.99\.1 is outside of the tested versions 0\.35 to 0\.42"):
        accelerate(small.autoencoder())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        accelerate(small.autoencoder())
    assert [versions.tested(v) for v in ("0.34.0", "0.35.0", "0.42.9", "0.43.0.dev0", "unknown")] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_importing_imports_nothing_of_diffusers_and_without_it_is_told_in_one_line():
    script = """
import sys
import sign_fast, sign_fast.integrations.diffusers as d
assert not {"diffusers", "transformers", "peft", "accelerate"} & set(sys.modules)
sys.modules["diffusers"] = None
from sign_fast.errors import SignFastError
try:
    d.accelerate(None)
except SignFastError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "diffusers is not installed: pip install 'sign-fast[diffusers]'\n"

"""What users do to a network once it is accelerated: hooks, other forwards, parameters, classes.

In float64, where ours is plain torch and roundings play no part.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import accelerate, acceleration, modules, restore
from sign_fast.kernels import dispatch
from tests.integrations.diffusers import small_models as small

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
SMALL = small.SD15 | {"layers_per_block": 1, "block_out_channels": (32, 32)}


def _network() -> Any:
    return small.copy_in(small.unet(SMALL), torch.float64)


def _call(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return small.call_unet(net, torch.float64)


def _ours(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if any("sign_fast" in c.__module__ for c in type(m).__mro__)]


def _block(net: Any) -> Any:
    return net.mid_block.resnets[0]


# {case: what to hook, how, and the sites that it splits}
HOOKS: dict[str, Any] = {
    "norm": (lambda net: _block(net).norm1, "forward", {"mid_block.resnets.0", "mid_block.resnets.0.norm1"}),
    "activation": (lambda net: _block(net).nonlinearity, "forward", {"mid_block.resnets.0"}),
    "last_norm": (lambda net: net.conv_norm_out, "forward", {"conv_norm_out", "conv_act"}),
    "last_activation": (lambda net: net.conv_act, "pre", {"conv_norm_out", "conv_act"}),
    "override": (lambda net: _block(net).norm2, "override", {"mid_block.resnets.0", "mid_block.resnets.0.norm2"}),
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_on_a_norm_or_activation_sees_that_step_alone(case, monkeypatch):
    """Norm and SiLU in one pass leave nothing between the two for a hook to see or to change."""
    which, how, sites = HOOKS[case]
    seen = []

    def change(given: torch.Tensor) -> torch.Tensor:
        seen.append(given.clone())
        return given * 1.5 - 0.25

    def hook(net: Any) -> Any:
        module = which(net)
        if how == "pre":
            return module.register_forward_pre_hook(lambda module, given: (change(given[0]),))
        if how == "forward":
            return module.register_forward_hook(lambda module, given, output: change(output))
        module.forward = lambda x, forward=module.forward: change(forward(x))
        return None

    net = _network()
    untouched = _call(net)
    hook(net)
    want = _call(net)
    net = _network()
    a = accelerate(net)
    assert not sites & {site.name for site in a.left}
    handle = hook(net)
    left = {site.name: site.reason for site in a.left}
    assert sites <= left.keys() and all("to see that step alone; remove it" in left[name] for name in sites)
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(dispatch.SlowPathWarning, match="see that step alone"):
        torch.testing.assert_close(_call(net), want, **CLOSE)
    calls = len(seen) // 2
    for one, other in zip(seen[:calls], seen[calls:], strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert calls and not torch.allclose(want, untouched)
    monkeypatch.setenv("SIGN_FAST_STRICT", "1")
    with pytest.raises(dispatch.SlowPathError, match="see that step alone"):
        _call(net)
    if handle is not None:
        handle.remove()
        assert not sites & {site.name for site in a.left}
        torch.testing.assert_close(_call(net), untouched, **CLOSE)


def test_a_hook_on_an_attentions_norm_sees_tokens():
    net = small.copy_in(small.autoencoder(), torch.float64)
    seen = []
    norm = net.decoder.mid_block.attentions[0].group_norm
    norm.register_forward_hook(lambda module, given, output: seen.append(output.clone()))
    with torch.no_grad():
        small.call_autoencoder(net, torch.float64)
        accelerate(net)
        small.call_autoencoder(net, torch.float64)
    want, got = seen
    torch.testing.assert_close(got, want, **CLOSE)


def test_another_activation_and_norms_set_later_run():
    net = _network()
    a = accelerate(net)
    _block(net).nonlinearity = nn.GELU()
    _block(net).norm2 = nn.GroupNorm(4, 32).double()
    accelerate(net)  # once more finds them
    assert {s.name: s.reason for s in a.left}["mid_block.resnets.0"] == "its activation is not SiLU"
    net.conv_act = nn.GELU()
    accelerate(net)
    got = _call(net)
    restore(net)
    torch.testing.assert_close(got, _call(net), **CLOSE)


def test_a_parameter_of_another_shape_stays_as_it_is():
    """Such as an input convolution widened for inpainting: the strides of the old one would overlap in it."""
    net = _network()
    accelerate(net)
    wide = torch.cat([net.conv_in.weight.detach()] * 2, 1).contiguous()
    net.conv_in.weight = nn.Parameter(wide.clone())
    restore(net)
    assert torch.equal(net.conv_in.weight, wide) and net.conv_in.weight.stride() == wide.stride()


def test_a_parameter_of_two_modules_gets_its_strides_back():
    net = _network()
    first, second = (block.conv2 for block in net.mid_block.resnets)
    second.weight = first.weight
    before = first.weight.stride()
    accelerate(net)
    assert first.weight.stride() != before
    restore(net)
    assert first.weight.stride() == before and second.weight is first.weight


@pytest.mark.parametrize("name", ["conv1", "norm1"])
def test_a_class_made_of_ours_is_told_and_nothing_is_changed(name):
    net = _network()
    want = _call(net)
    accelerate(net)
    module = getattr(_block(net), name)
    parametrizations.weight_norm(module, dim=0)
    kind = type(module)
    ours = _ours(net)
    with pytest.raises(SignFastError) as told:
        restore(net)
    made = f"mid_block.resnets.0.{name} has become a {kind.__name__} since accelerate"
    assert str(told.value) == f"{made}: undo that, or restore before it"
    a = accelerate(net)  # which leaves it what it is
    assert type(module) is kind and _ours(net) == ours
    assert any("derived" in s.reason for s in a.left if s.name.endswith(f"resnets.0.{name}")) or name == "conv1"
    torch.testing.assert_close(_call(net), want, **CLOSE)
    parametrize.remove_parametrizations(module, "weight")
    restore(net)
    assert not _ours(net)
    torch.testing.assert_close(_call(net), want, **CLOSE)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_the_parameters_of_a_sharded_network_stay_fsdps(mesh):
    """Between forward and backward they are whole and look like any other's; other memory would no longer be FSDP's."""

    def losses(speed: bool) -> list[float]:
        net = _network()
        fully_shard(net, mesh=mesh)
        _call(net)
        if speed:
            a = accelerate(net)
            reasons = {s.reason for s in a.left if s.kind == "convolution weight"}
            assert len(reasons) == 1 and "no plain tensor (sharded" in reasons.pop()
            assert "GroupNorm–SiLU" in {s.kind for s in a.changed}
        net.reshard()
        optimizer = torch.optim.SGD(net.parameters(), 1e-2)
        found = []
        for _ in range(2):
            loss = small.call_unet(net, torch.float64).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        if speed:
            restore(net)
            assert not _ours(net)
        return found

    want = losses(False)
    assert losses(True) == pytest.approx(want, rel=1e-9) and want[0] != want[1]


def test_accelerate_before_sharding(mesh):
    net = _network()
    want = _call(net)
    accelerate(net, channels_last=False)
    fully_shard(net.mid_block.resnets[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    torch.testing.assert_close(_call(net), want, **CLOSE)
    with pytest.raises(SignFastError, match=r"mid_block\.resnets\.0 has become a FSDPResnetBlock2D since accelerate"):
        restore(net)


def test_an_error_in_between_leaves_what_computes_and_restores(monkeypatch):
    net = _network()
    before = {name: (type(m), sorted(vars(m))) for name, m in net.named_modules()}
    strides = {name: p.stride() for name, p in net.named_parameters()}
    want = _call(net)
    calls = []
    keep = acceleration._keep_strides

    def full(module: nn.Module) -> None:
        keep(module)
        calls.append(module)
        if len(calls) == 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(acceleration, "_keep_strides", full)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(net)
    torch.testing.assert_close(_call(net), want, **CLOSE)
    restore(net)
    assert {name: (type(m), sorted(vars(m))) for name, m in net.named_modules()} == before
    assert {name: p.stride() for name, p in net.named_parameters()} == strides


def test_a_network_is_let_go_as_before():
    """Nothing of ours makes a cycle: a dropped network's memory is free at once."""
    net = _network().mid_block  # networks of diffusers' themselves may have some
    owner = _network()
    owner.mid_block = net
    accelerate(owner)
    _call(owner)
    gone = weakref.ref(net.resnets[0].norm1), weakref.ref(owner.conv_norm_out)
    del net, owner
    assert [ref() for ref in gone] == [None, None]


def test_a_convolutions_bias_in_the_next_pass(monkeypatch):
    """As on a GPU, where the library would add it in a pass of its own."""
    monkeypatch.setattr(modules, "_folds_biases", lambda x: True)
    net = _network()
    hooked = []
    net.mid_block.resnets[1].conv1.register_forward_hook(lambda module, given, output: hooked.append(0))

    def results() -> list[torch.Tensor]:
        x = small.draw(2, 4, 16, 16, seed=1).double().requires_grad_()
        y = small.call_unet(net, torch.float64, x)
        return [_call(net), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]

    want = results()
    accelerate(net)
    for got, plain in zip(results(), want, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item() + 1e-12)
    assert len(hooked) == 4  # such a convolution is called

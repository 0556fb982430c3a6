"""The providers: who holds weights, what is compiled and how, what takes too long."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.comparison import time_limit
from benchmarks.providers import PROVIDERS, Case, build_network, check, make, reference
from sign_fast.errors import SignFastError
from sign_fast.nn import Conv2d

DIGITS = Case("digits-uncond", "few_step", 1, "float32", "cpu")


def places(module):
    return {p.data_ptr() for p in module.parameters()}


def test_plain_holds_no_copy_and_nobody_changes_the_shared_network():
    net = build_network(DIGITS)
    before = {name: (p.data_ptr(), p.stride(), p.dtype) for name, p in net.named_parameters()}
    assert places(make("plain", DIGITS, net).net) == places(net)
    for name in PROVIDERS:
        provider = make(name, replace(DIGITS, dtype="bfloat16"), net)
        network = provider.net.net if name == "sign_fast" else provider.net
        assert name in ("plain", "compile") or not places(network) & places(net)
    assert {name: (p.data_ptr(), p.stride(), p.dtype) for name, p in net.named_parameters()} == before


def test_a_network_of_its_own_is_used_as_it_is():
    for name in ("plain", "drop_in"):
        net = build_network(DIGITS)
        provider = make(name, DIGITS, net, own=True)
        assert {*map(id, provider.net.parameters())} == {*map(id, net.parameters())}


def test_the_engine_frees_a_network_of_its_own():
    net = build_network(DIGITS)
    make("sign_fast", DIGITS, net, own=True)
    assert not any(p.numel() for p in net.parameters())


@pytest.mark.parametrize("device, freezes", [("cpu", True), ("cuda", False)])
def test_compile_freezes_on_a_cpu_and_only_while_it_compiles(device, freezes, monkeypatch):
    seen = []

    def compile(net, **options):
        assert options == {"mode": "max-autotune", "dynamic": False}

        def call(*arguments):
            seen.append((torch._inductor.config.freezing, torch.is_grad_enabled()))
            return net(*arguments)

        call.net = net
        return call

    monkeypatch.setattr(torch, "compile", compile)
    net = build_network(DIGITS)
    provider = make("compile", replace(DIGITS, device=device, dtype="bfloat16"), net)
    layers = [layer for layer in provider.net.compiled.net.modules() if isinstance(layer, Conv2d)]
    weights = [layer.weight for layer in layers if layer.weight is not None]
    assert weights and all(weight.dtype == torch.bfloat16 for weight in weights)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    provider.case = replace(provider.case, device="cpu")
    provider([1, 2])
    provider([1, 2])
    assert seen == [(freezes, False), (False, False)]
    assert torch._inductor.config.freezing is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_is_found(dtype):
    case = replace(DIGITS, preset="digits-cond", dtype=dtype)
    net = build_network(case)
    seeds = [3, 4, 5]
    expected = reference(case, net, seeds)
    provider = make("drop_in", case, net)
    assert check(provider, expected, seeds) == ""
    with torch.no_grad():
        next(p for p in provider.net.model.dec.parameters() if p.ndim == 4).mul_(1.2)
    assert check(provider, expected, seeds).startswith("drop_in: error ")


def test_other_steps_share_the_network():
    case = replace(DIGITS, sampler="edm")
    one = make("drop_in", case, build_network(case))
    three = one.with_steps(3)
    assert three.net is one.net and (one.case.steps, three.case.steps) == (1, 3)
    assert (one.case.calls(), three.case.calls(), replace(DIGITS, steps=3).calls()) == (1, 5, 3)
    assert not torch.equal(one([7]), three([7]))


def test_unknown_providers_are_refused():
    with pytest.raises(SignFastError, match="unknown provider 'magic': known: plain, compile"):
        make("magic", DIGITS, build_network(DIGITS))


def test_what_takes_too_long_is_ended_though_it_goes_on_after_errors():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="took longer than 0 s"), time_limit(0.05):
        for _ in range(1000):
            with contextlib.suppress(Exception):
                time.sleep(0.01)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

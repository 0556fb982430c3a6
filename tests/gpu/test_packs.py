"""Packs on a GPU: bit-identical to Triton's just-in-time compiler, inside and outside of graph capture."""

from __future__ import annotations

import pytest
import torch

from sign_fast.kernels import operators
from sign_fast.kernels.packs import build as builder
from sign_fast.kernels.packs import calls, dispatch
from sign_fast.kernels.packs.architectures import Architecture
from sign_fast.kernels.packs.calls import Shape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
pytest.importorskip("sign_fast._launcher", exc_type=ImportError)

BATCH = 4
EVERY = 12  # of the digits' calls, so that compiling takes seconds


@pytest.fixture(scope="module")
def table():
    own = calls.networks()["digits-uncond"]
    kinds = {call.operator: call for call in own}  # one of each operator at least
    return list(dict.fromkeys([*kinds.values(), *own[::EVERY]]))


@pytest.fixture(scope="module")
def packs(table, tmp_path_factory):
    major, minor = torch.cuda.get_device_capability()
    folder = tmp_path_factory.mktemp("packs")
    builder.build([Architecture(10 * major + minor)], folder, table={"digits": table})
    return folder


@pytest.fixture
def from_packs(packs, monkeypatch):
    """The packs serve while they are switched on, and a miss is an error."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(dispatch, "_on_device", {} if on else {0: None})
        dispatch._launcher.cache_clear()  # which has loaded what earlier tests launched
        monkeypatch.setenv(dispatch.PACKS, str(packs))
        monkeypatch.setenv(dispatch.NO_JIT, "1") if on else monkeypatch.delenv(dispatch.NO_JIT, raising=False)

    return switch


def values(argument, generator):
    if isinstance(argument, tuple):
        return [values(item, generator) for item in argument]
    if not isinstance(argument, Shape):
        return argument
    meta = argument.at(BATCH)
    extent = meta.untyped_storage().nbytes() // meta.element_size()
    if meta.dtype.is_floating_point:
        memory = torch.randn(extent, generator=generator).to(meta.dtype)
    else:
        memory = torch.randint(0, 100, (extent,), generator=generator).to(meta.dtype)
    return memory.cuda().as_strided(meta.shape, meta.stride(), meta.storage_offset())


def outputs(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]


def test_packs_give_the_bits_of_the_just_in_time_compiler(table, from_packs):
    calls._register()
    arguments = [[values(a, torch.Generator().manual_seed(i)) for a in call.arguments] for i, call in enumerate(table)]
    found = {}
    for on in (False, True):
        from_packs(on)
        found[on] = [
            outputs(operators.on_gpu[call.operator](*given)) for call, given in zip(table, arguments, strict=True)
        ]
    served = dispatch.of_device(0)
    assert served.hits.total() >= len(table) and not served.misses
    for call, a, b in zip(table, found[False], found[True], strict=True):
        assert a and len(a) == len(b), call
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()) and one.isnan().equal(other.isnan()), call


def test_a_first_launch_may_be_captured(table, from_packs):
    """The module is loaded during the capture, which the driver forbids unless it is told otherwise."""
    calls._register()
    call = next(c for c in table if c.operator == "group_norm_silu")
    given = [values(a, torch.Generator().manual_seed(1)) for a in call.arguments]
    from_packs(False)
    (want,) = outputs(operators.on_gpu[call.operator](*given))
    from_packs(True)
    graph, launcher = torch.cuda.CUDAGraph(), dispatch._launcher()
    assert launcher.loaded == {}
    with torch.cuda.graph(graph):
        (out,) = outputs(operators.on_gpu[call.operator](*given))
    assert launcher.loaded == {0: 1} and dispatch.of_device(0).hits.total() == 1
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_a_generation_from_packs_is_the_same(from_packs, tmp_path, monkeypatch):
    from sign_fast import ImageGenerator
    from sign_fast.deployment.recording import generation
    from sign_fast.models.presets import preset

    from_packs(False)
    want = ImageGenerator.from_pretrained("digits-uncond", "cuda")(range(16), steps=4)
    major, minor = torch.cuda.get_device_capability()
    own = list(generation(*preset("digits-uncond"), torch.float32))
    builder.build([Architecture(10 * major + minor)], tmp_path, table={"digits": own})
    from_packs(True)
    monkeypatch.setenv(dispatch.PACKS, str(tmp_path))
    got = ImageGenerator.from_pretrained("digits-uncond", "cuda")(range(16), steps=4)
    assert torch.equal(got, want) and dispatch.of_device(0).hits.total() > 0

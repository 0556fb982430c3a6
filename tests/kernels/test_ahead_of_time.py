"""Compilation without a GPU: the specialisation is Triton's own, and what is read from the machine code is there."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from sign_fast.kernels import ahead_of_time
from sign_fast.kernels.ahead_of_time import ARCHITECTURES, specialise
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs.key import key
from sign_fast.kernels.resources import occupancy, resources, wide_share
from sign_fast.kernels.sampler_step.launches import launches_noise
from tests.example_kernels import add, annotated_kernel, count_kernel, hold_kernel, meta, product_kernel


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def by_triton(launch: Launch):
    """What Triton's just-in-time compiler makes of the launch's arguments; empty attributes left out."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, found, options = bind(**launch.arguments, **launch.constants)
    _, signature, constants, attributes = launch.kernel._pack_args(backend, {}, bound, found, options)
    # some versions of Triton give attributes to constants, too, which nothing reads
    return signature, constants, {k: v for k, v in attributes.items() if v and k not in constants}


def assert_tritons(launch: Launch):
    assert tuple(specialise(launch)) == by_triton(launch)


@pytest.mark.parametrize("scale", [1.0, 2, True, None])
@pytest.mark.parametrize("skip", ["none", "aligned", "shifted"])
def test_specialisation_is_tritons(scale, skip):
    x = torch.zeros(64)
    y = torch.zeros(64, dtype=torch.bfloat16)
    other = {"none": None, "aligned": x[4:], "shifted": x[5:]}[skip]
    launch = add(x, other, y)
    for n in (0, 1, 2, 15, 16, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1):
        assert_tritons(replace(launch, arguments={**launch.arguments, "n": n, "scale": scale}))


@pytest.mark.parametrize("value", [0, 1, 16, 17, 2**40])
def test_specialisation_of_parameters_that_ask_for_another_one(value):
    x = torch.zeros(64)
    typed = {"x": x, "as_is": value, "wide": value, "real": 1.5, "pointer": x[1:]}
    assert_tritons(Launch(annotated_kernel, (1,), typed, {"BLOCK": 16}))
    assert_tritons(Launch(annotated_kernel, (1,), {**typed, "pointer": x}, {"BLOCK": 16}))


@pytest.mark.parametrize("dtype", list(ahead_of_time._POINTERS), ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_pointers_and_their_alignment_on_the_meta_device_and_on_this_one(dtype, offset):
    real = torch.zeros(64, dtype=dtype)
    assert real.data_ptr() % 16 == 0
    assert_tritons(add(real[offset:], None, real))
    without = real.to("meta")
    assert specialise(add(without[offset:], None, without)) == specialise(add(real[offset:], None, real))


def test_keys_tell_machine_code_apart():
    x = meta(4096)
    launch = add(x, None, x)
    same = add(meta(8192), None, meta(8192))  # divisible by 16 as well
    others = [
        add(meta(4095), None, x),
        add(x, x, x),
        add(x, None, meta(4096, dtype=torch.float32)),
        add(x[1:], None, x),
        add(x, None, x, num_warps=8),
        replace(launch, num_stages=2),
        replace(launch, constants={"BLOCK": 2048}),
    ]
    assert key(same) == key(launch)
    # add takes n from y: the first of the others differs in nothing but a shape that no argument carries
    assert key(others.pop(0)) == key(launch)
    assert len({key(other) for other in [launch, *others]}) == len(others) + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_machine_code_of_a_copy(architecture):
    x = meta(4096)
    launch = add(x, None, x)
    compiled = ahead_of_time.compile(launch, architecture)
    found = resources(compiled)
    assert compiled.parameters == ("x", "y", "n", "scale")
    assert found.spilled_bytes == 0 and found.warps == 4 and found.shared_bytes == 0 and found.atomics == 0
    assert set(found.loads) == set(found.stores) == {16}
    assert found.accesses == {"x": {16: 1}, "y": {16: 1}}
    assert found.occupancy == 1 and wide_share(found, launch) == 1


def test_a_narrow_argument_weighs_what_it_is_large():
    x = meta(4096)
    launch = add(x, x[1:], x)  # 16-byte accesses cannot start there
    found = resources(ahead_of_time.compile(launch, 90))
    assert found.accesses["skip"] == {2: 8} and found.accesses["x"] == found.accesses["y"] == {16: 1}
    assert wide_share(found, launch) == pytest.approx(2 * 4096 / (2 * 4096 + 4095))


def test_spills_are_found():
    x = meta(16384, dtype=torch.float32)
    launch = Launch(hold_kernel, (1,), {"x": x, "y": x}, {"BLOCK": 16384}, num_warps=1)
    assert resources(ahead_of_time.compile(launch, 90)).spilled_bytes > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrix_instructions_and_shared_memory_are_found(architecture):
    name = {90: "HGMMA", 100: "UTCHMMA"}.get(architecture, "HMMA")
    a = meta(64, 64)
    launch = Launch(product_kernel, (1,), {"a": a, "b": a, "c": a}, {"SIZE": 64})
    found = resources(ahead_of_time.compile(launch, architecture))
    assert found.matrix.get(name, 0) > 0 and found.shared_bytes > 0


def test_atomics_are_found():
    x = meta(256, dtype=torch.float32)
    launch = Launch(count_kernel, (1,), {"x": x, "total": x[:1], "n": 256}, {"BLOCK": 256})
    assert resources(ahead_of_time.compile(launch, 90)).atomics > 0


def test_the_same_kernel_gives_the_same_bytes(tmp_path, monkeypatch):
    launch = add(meta(4096), None, meta(4096))
    codes = []
    for folder in ("a", "b"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
        codes.append(ahead_of_time.compile(launch, 90).cubin)
    assert hashlib.sha256(codes[0]).digest() == hashlib.sha256(codes[1]).digest()
    assert str(Path(__file__).parent).encode() not in codes[0]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "want"),
    [  # by the vendor's occupancy calculator
        (80, 32, 0, 4, 1.0),
        (90, 255, 0, 4, 0.125),
        (90, 168, 0, 12, 0.1875),
        (90, 32, 100 << 10, 4, 0.125),
        (80, 64, 48 << 10, 4, 0.1875),
        (89, 40, 0, 8, 1.0),
        (89, 48, 0, 1, 0.5),
        (120, 128, 99 << 10, 8, 8 / 48),
    ],
)
def test_occupancy(architecture, registers, shared, warps, want):
    assert occupancy(architecture, registers, shared, warps) == pytest.approx(want)


def test_without_cuobjdump_the_error_names_the_remedy(monkeypatch):
    compiled = ahead_of_time.compile(add(meta(4096), None, meta(4096)), 90)
    monkeypatch.setattr(type(triton.knobs.nvidia).__dict__["cuobjdump"], "default_path", "/nowhere/cuobjdump")
    with pytest.raises(FileNotFoundError, match="TRITON_CUOBJDUMP_PATH"):
        resources(compiled)


def test_multiplications_and_additions_stay_apart_where_a_launch_says_so():
    """The sampler step's bits are those of plain torch: what is compiled ahead of time is what will run."""
    seeds, y = torch.empty(4, dtype=torch.int64, device="meta"), meta(4, 3, 32, 32, dtype=torch.float32)
    (apart,) = launches_noise(seeds, 0, y, 1.0, KNOWN[90])
    fused = Launch(apart.kernel, apart.grid, apart.arguments, apart.constants, apart.num_warps)
    assert key(apart) != key(fused)
    found = [ahead_of_time.compile(launch, 90) for launch in (apart, fused)]
    assert [done.metadata["enable_fp_fusion"] for done in found] == [False, True]
    assert [bool(re.search(r"fma\.rn\.f32", done.ptx)) for done in found] == [False, True]

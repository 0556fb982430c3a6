"""What DESIGN.md promises of GroupNorm–SiLU, one read and one write, counted in the interpreter.

Each shape runs on one image with the configuration that it has at batch 64 on an H100.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.kernel_cases.group_norm_silu import NormCase
from benchmarks.official_shapes import Norm, calls, official
from benchmarks.traffic import passes, strategy
from sign_fast.kernels.device import KNOWN, interpreting
from sign_fast.kernels.group_norm_silu import config, launches

if not interpreting():
    pytest.skip("bytes are counted in the interpreter", allow_module_level=True)

from tests.traffic import Traffic, count_bytes

BATCH = 64
CIFAR = sorted(call for call in calls("cifar10-uncond-vp") if isinstance(call, Norm))
# 12 channels a group: two groups are the least that 16-bit accesses of 16 bytes can share, 24 channels padded to 32 are
# 32768 elements of x and of dy, and the gradient of so many spills on every architecture
NOT_HELD = [norm for norm in CIFAR if norm.channels == 384 and norm.size == 32]
LARGE = [norm for norm in official(Norm) if norm.size == 64 and norm.channels <= 256]


@pytest.fixture(autouse=True)
def _plans(monkeypatch):
    rule = config.plan
    monkeypatch.setattr(launches, "plan", lambda call, device: rule(replace(call, batch=BATCH), device))


def at_batch(norm: Norm, dtype: str) -> NormCase:
    return NormCase(BATCH, dtype, norm)


def one_image(norm: Norm, dtype: str) -> NormCase:
    return NormCase(1, dtype, norm)


def activations(inputs, *others):
    return [inputs[name] for name in ("x", "x2", "skip") if name in inputs] + list(others)


def forward(case: NormCase) -> tuple[Traffic, int, int]:
    """The traffic, the bytes of it that are activations, and how many bytes the other tensors have."""
    inputs = case.inputs("cpu")
    with torch.no_grad(), count_bytes() as moved:
        outputs = case.ours(inputs)
    large = activations(inputs)
    # what a second walk reads back in the residual form is the stream, an output
    of_large = moved.read_from(*large, *outputs) + moved.written_to(*outputs)
    small = sum(t.nbytes for t in inputs.values()) - sum(t.nbytes for t in large)
    return moved, of_large, small


def backward(case: NormCase) -> tuple[Traffic, int, int]:
    inputs = case.inputs("cpu")
    outputs = case.ours(inputs)
    upstream = [torch.randn_like(y) for y in outputs]
    with count_bytes() as moved:
        found = dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), upstream), strict=True))
    saved = [outputs[0]] if case.joins else activations(inputs)
    of_large = moved.read_from(*saved, *upstream) + moved.written_to(*[found[n] for n in ("x", "x2") if n in found])
    channels = case.norm.channels
    parameters = sum(t.nbytes for name, t in inputs.items() if name not in ("x", "x2", "skip"))
    # statistics; three sums a channel and image, written and read back; their totals; gradients in float32
    small = 4 * (3 * case.norm.groups + 6 * channels + 3 * channels) + 2 * parameters + 4 * channels
    return moved, of_large, small


def check(case: NormCase, direction: str, least: int) -> None:
    moved, of_large, small = forward(case) if direction == "forward" else backward(case)
    assert of_large <= 1.02 * least
    assert of_large >= least, "something was not counted"
    assert moved.read + moved.written <= 1.02 * (least + small)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", CIFAR, ids=lambda norm: at_batch(norm, "float32").shape)
def test_every_cifar_shape_is_read_and_written_once(norm, direction, dtype):
    case = one_image(norm, dtype)
    least = case.bytes(direction)
    if norm in NOT_HELD and direction == "backward" and dtype == "bfloat16":
        least = least // 3 * 5  # two walks: x and dy twice, the second time from L2
    check(case, direction, least)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", LARGE, ids=lambda norm: at_batch(norm, "float32").shape)
def test_the_table_is_what_is_moved_at_64x64(norm, direction):
    """And where the tile fits the table says once."""
    case = one_image(norm, "float32")
    reads, writes = passes(at_batch(norm, "float32"), direction, KNOWN[90])
    plane = norm.channels * norm.size**2 * case.itemsize
    check(case, direction, (reads + writes) * plane)
    if strategy(at_batch(norm, "float32"), direction, KNOWN[90]) == "tile":
        assert (reads + writes) * plane == case.bytes(direction)


def test_where_the_tile_fits_at_64x64():
    shapes = [norm for norm in official(Norm) if norm.size == 64]
    fitting = [norm for norm in shapes if strategy(at_batch(norm, "float32"), "forward", KNOWN[90]) == "tile"]
    assert fitting and set(fitting) <= set(LARGE)

"""The sampler step reads x and F once and writes once, counted in the interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.sampler_step import FORMS, SamplerCase
from sign_fast.kernels.device import interpreting

if not interpreting():
    pytest.skip("bytes are counted in the interpreter", allow_module_level=True)

from tests.traffic import count_bytes

SHAPES = [(2, 3, 32), (1, 4, 64), (3, 3, 7)]  # images, channels, height and width


@pytest.mark.parametrize("layouts", ["nchw", "channels_last", "f in channels_last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tensor_is_moved_once(shape, form, dtype, layouts):
    batch, *image = shape
    case = SamplerCase(batch, dtype, *image, form, layouts == "channels_last")
    inputs = case.inputs("cpu")
    if layouts == "f in channels_last" and "f" in inputs:
        inputs["f"] = inputs["f"].contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), count_bytes() as moved:
        (y,) = case.ours(inputs)
    for name in ("x", "f"):
        if name in inputs:
            assert moved.read_from(inputs[name]) == inputs[name].nbytes
    assert moved.written == moved.written_to(y) == y.nbytes
    # the rest is numbers for each image, which all its programs read: in a tiny image they weigh
    numbers = 0 if image != [3, 7] else sum(t.nbytes for t in inputs.values() if t.ndim == 1)
    assert moved.read + moved.written <= 1.02 * (case.bytes("forward") + numbers)

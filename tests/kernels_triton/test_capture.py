"""Every operation, forward and backward, in a CUDA graph: nothing synchronises, and a replay computes anew."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from benchmarks.kernel_cases import OPERATIONS, small_cases
from benchmarks.kernel_timing import prepare
from sign_fast.kernels.device import interpreting

if interpreting():
    pytest.skip("CUDA graphs need a GPU", allow_module_level=True)

CASES = [
    pytest.param(case, direction, id=f"{operation}-{case.shape}-{case.dtype}-{direction}")
    for operation in OPERATIONS
    for case in small_cases(operation)
    for direction in case.directions
]


@contextmanager
def nothing_synchronises():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_capture_and_replay(case, direction):
    def run(inputs):  # backward with its forward, or what that saved would stay as it was
        return prepare(inputs, case.ours, direction)()

    inputs, others = case.inputs("cuda"), case.inputs("cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = run(others)  # compiles the kernels
        with nothing_synchronises():
            run(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), nothing_synchronises():
            got = run(inputs)
        with torch.no_grad():
            for name, t in inputs.items():
                t.copy_(others[name])
        graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(got, want, strict=True):
        assert torch.equal(ours, expected)

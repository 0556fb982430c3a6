"""What `sign-fast info` says of the operations is what they do."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from sign_fast import functional
from sign_fast.kernels import device, dispatch, extension, overview
from sign_fast.kernels.dispatch import Reason

ON_GPU = ["group_norm_silu", "attention", "distill_loss", "sampler_step", "combine"]
OPERATIONS = [*ON_GPU, "convolution"]  # which is cuDNN's on a GPU
WORDS = {"cpp": "C++", "flash": "PyTorch's flash attention"}


def one_call(operation, gradients):
    x = torch.rand(2, 12, 4, 4, requires_grad=gradients)
    if operation == "group_norm_silu":
        functional.group_norm_silu(x, 3, None, None)
    elif operation == "attention":
        functional.projected_attention(x, 2)
    elif operation == "distill_loss":
        functional.fake_score_loss(x, torch.zeros_like(x), torch.ones(2))
    elif operation == "combine":
        functional.combine((x, x), (0.5, 2.0))
    elif operation == "convolution":
        functional.convolution(x, torch.ones(4, 12, 3, 3))
    else:
        functional.sampler_step(x, seeds=torch.arange(2))


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_table_is_true_of_the_cpu(operation, gradients):
    before = dispatch.taken.copy()
    one_call(operation, gradients)
    ((name, implementation),) = dispatch.taken - before
    row = overview.operations()[f"{operation}, cpu"]
    assert name == operation
    if gradients and row.endswith(", gradients in plain PyTorch"):
        assert implementation == "reference"
    else:
        assert row.split(", ")[0] == WORDS[implementation]


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: Reason("no compiler", "get one"))
    table = overview.operations()
    assert table["attention, cpu"] == "PyTorch's flash attention"
    for operation in ("group_norm_silu", "distill_loss", "sampler_step", "combine", "convolution"):
        assert table[f"{operation}, cpu"] == "plain PyTorch: no compiler; get one"


@pytest.fixture
def gpus(monkeypatch):
    """An H100 and a Turing card."""
    turing = dataclasses.replace(device.KNOWN[90], name="T4", capability=(7, 5))
    monkeypatch.setattr(device, "_cuda_device", [device.KNOWN[90], turing].__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device._gpu_reason.cache_clear()
    yield
    device._gpu_reason.cache_clear()


def test_gpus(gpus, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    table = overview.operations()
    for operation in ON_GPU:
        assert table[f"{operation}, cuda:0"].split(", ")[0] == "Triton"
        assert table[f"{operation}, cuda:1"].endswith("need compute capability 8.0, this GPU has 7.5")


def test_a_gpu_without_triton(gpus, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    table = overview.operations()
    for operation in ON_GPU:
        assert table[f"{operation}, cuda:0"] == (
            "plain PyTorch: Triton is not installed, and no pack of machine code fits; pip install triton"
        )


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert set(overview.operations()) == {f"{operation}, cpu" for operation in OPERATIONS}

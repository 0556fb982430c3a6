"""The sampler step's Triton kernels against the reference: same integers, same normals, same bytes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from oracle import TRITON_DEVICE, assert_close
from sign_fast import functional
from sign_fast.kernels import dispatch
from sign_fast.kernels.sampler_step import reference, triton_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@triton.jit
def philox_kernel(counters, seed, words, N: tl.constexpr):
    i = tl.arange(0, N) * 4
    c0, c1, c2, c3 = (tl.load(counters + i + j).to(tl.uint32) for j in (0, 1, 2, 3))
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(words + i, w0.to(tl.int64))
    tl.store(words + i + 1, w1.to(tl.int64))
    tl.store(words + i + 2, w2.to(tl.int64))
    tl.store(words + i + 3, w3.to(tl.int64))


def seeds(batch: int) -> torch.Tensor:
    """Of every size: the high half of the key counts too."""
    return torch.tensor([(i + 1) * 0x9E3779B97F4A7C15 % 2**63 - 2**62 for i in range(batch)])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.stride() == b.stride() and torch.equal(a.cpu(), b)


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    c, k, w = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    seed = k[1] << 32 | k[0]
    got = torch.empty(8, dtype=torch.int64, device=TRITON_DEVICE)
    seed = torch.tensor([seed - (seed >> 63 << 64)], device=TRITON_DEVICE)
    philox_kernel[(1,)](torch.tensor(c * 2, device=TRITON_DEVICE), seed, got, 2)
    assert got.tolist() == w * 2


@triton.jit
def pair_kernel(words, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x, y = triton_kernels.normal_pair(tl.load(words + 2 * i).to(tl.uint32), tl.load(words + 2 * i + 1).to(tl.uint32))
    tl.store(out + 2 * i, x)
    tl.store(out + 2 * i + 1, y)

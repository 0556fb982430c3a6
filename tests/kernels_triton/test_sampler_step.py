"""The sampler step's Triton kernels against the reference: same integers, same normals, same bytes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sign_fast import functional
from sign_fast.kernels import dispatch
from sign_fast.kernels.sampler_step import reference, triton_kernels
from tests.oracle import TRITON_DEVICE, assert_close

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
    return torch.tensor([(i + 1) * 0x9E3779B97F4A7C15 % 2**63 - 2**62 for i in range(batch)], dtype=torch.int64)


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


def test_normals_have_the_reference_bits():
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, reference.NEAR_ONE, 0xFFFFFFFF - reference.NEAR_ONE]
    edges = torch.tensor(edges + [(i << 29) + d & 0xFFFFFFFF for i in range(8) for d in (-1, 0, 1)])
    words = torch.cat(
        (torch.cartesian_prod(edges, edges).flatten(), reference.words(torch.tensor([9]), 5, 1 << 21)[0].flatten())
    )
    words = words[: len(words) // 65536 * 65536].view(-1, 4)
    out = torch.empty(words.numel(), device=TRITON_DEVICE)
    pair_kernel[(words.numel() // 65536,)](words.to(TRITON_DEVICE), out, 32768, enable_fp_fusion=False)
    assert torch.equal(out.cpu().view_as(words), reference.normals(words))
    want = reference.normals(words, torch.float64)
    unit = (torch.nextafter(want.float().abs(), torch.tensor(torch.inf)) - want.float().abs()).double()
    assert ((out.cpu().view_as(words).double() - want).abs() / unit).max() <= 4


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 5, 7), (4, 8, 8), (1, 3, 3), (5, 1, 1), (3, 1, 1)], ids=str)
def test_philox_normal(shape, last):
    layout = torch.channels_last if last else torch.contiguous_format
    before = dispatch.taken["sampler_step", "triton"]
    for step in (0, 1, -1, 2**31 + 3):
        got = functional.philox_normal(seeds(3), step, shape, scale=80.0, device=TRITON_DEVICE, memory_format=layout)
        assert same(got, reference.philox_normal(seeds(3), step, shape, 80.0, torch.float32, last))
    assert dispatch.taken["sampler_step", "triton"] == before + 4


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_philox_normal_in_half_precision(dtype):
    got = functional.philox_normal(seeds(2), 3, (3, 8, 8), dtype=dtype, device=TRITON_DEVICE)
    want = reference.philox_normal(seeds(2), 3, (3, 8, 8), 1.0, torch.float64, False)
    assert got.dtype == dtype
    assert_close(got, want, want.to(dtype))


def views(shape, dtype, kind):
    """A (B, C, H, W) tensor in one of the layouts that the kernels step through."""
    g = torch.Generator().manual_seed(hash((shape, kind)) % 2**31)
    batch, channels, height, width = shape
    if kind == "slice":  # of a network with further outputs
        return torch.randn((batch, channels + 3, height, width), generator=g).to(dtype)[:, :channels]
    if kind == "transposed":  # no single stride from pixel to pixel
        return torch.randn((batch, channels, width, height), generator=g).to(dtype).transpose(2, 3)
    x = torch.randn(shape, generator=g).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize(
    "kinds", [("nchw", "nchw"), ("channels_last", "slice"), ("transposed", "channels_last")], ids=str
)
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (3, 3, 5, 7)], ids=str)
def test_sampler_step(shape, kinds, dtypes):
    x, f = (views(shape, d, k) for d, k in zip(dtypes, kinds, strict=True))
    batch = shape[0]
    c_skip, c_out, sigma = torch.rand(3, batch)
    keys = seeds(batch)
    device = [t.to(TRITON_DEVICE) for t in (x, f, c_skip, c_out)]
    options = {"seeds": keys.to(TRITON_DEVICE), "step": 2, "scale": 0.75, "sigma": sigma.to(TRITON_DEVICE)}
    wide = (x.double(), f.double(), c_skip, c_out)
    plain = (x, f, c_skip, c_out)
    noise = (keys, 2, 0.75, sigma)
    for got, want, close in (
        (functional.sampler_step(*device, **options), (*wide, *noise), (*plain, *noise)),
        (functional.sampler_step(*device), (*wide, None, 0, None, None), (*plain, None, 0, None, None)),
        (
            functional.sampler_step(device[0], **options),
            (wide[0], None, None, None, *noise),
            (x, None, None, None, *noise),
        ),
    ):
        assert got.dtype == x.dtype and got.is_contiguous(memory_format=_layout(x))
        base = reference.sampler_step(*close)
        assert_close(got, reference.sampler_step(*want), base)
        if x.dtype == torch.float32:
            assert torch.equal(got.cpu(), base)
    got = functional.precondition(device[0], device[1], device[2].view(-1, 1, 1, 1), device[3].view(-1, 1, 1, 1))
    assert torch.equal(got, functional.sampler_step(*device))


def _layout(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nchw", "channels_last", "slice", "transposed"])
def test_bytes(kind, dtype):
    for shape in ((2, 3, 16, 16), (3, 1, 5, 7), (2, 4, 3, 3)):
        x = views(shape, dtype, kind).clone(memory_format=torch.preserve_format)
        special = [torch.nan, torch.inf, -torch.inf, -1.0, 1.0, 127 / 127.5, -128 / 127.5, 3e38, 0.0]
        x[0, 0].copy_(torch.tensor(special * 29)[: x[0, 0].numel()].view_as(x[0, 0]))
        c = torch.rand(shape[0]) + 0.5
        got = functional.to_uint8(x.to(TRITON_DEVICE))
        assert got.is_contiguous() and same(got, reference.finish_images(x, None, None, None))
        arguments = (x, x.flip(0), c, c)
        assert same(functional.to_uint8(*(t.to(TRITON_DEVICE) for t in arguments)), reference.finish_images(*arguments))


def test_an_image_depends_on_its_seed_alone():
    whole = functional.philox_normal(seeds(5).to(TRITON_DEVICE), 1, (3, 16, 16))
    one = functional.philox_normal(seeds(5)[3:4].to(TRITON_DEVICE), 1, (3, 16, 16), memory_format=torch.channels_last)
    assert torch.equal(whole[3], one[0])


def test_empty():
    assert functional.philox_normal(seeds(0).to(TRITON_DEVICE), 0, (3, 4, 4)).shape == (0, 3, 4, 4)
    assert functional.to_uint8(torch.ones(0, 3, 4, 4, device=TRITON_DEVICE)).shape == (0, 4, 4, 3)

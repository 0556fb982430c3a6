"""What happens between two network calls, in plain torch: preconditioning, noise from counters, bytes at the end.

Noise is Philox 4x32-10 (Salmon et al. 2011): the key is an image's seed, the counter (element // 4, step, 0, 0), where
elements are numbered in C, H, W order whatever the memory format. So an image depends on its own seed alone. Four
words give four normals by Box and Muller's transform, in float32 operations that C++ and Triton repeat one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Word = tuple[Tensor, Tensor, Tensor, Tensor]
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# log1p(f) = f − f²/2 + f³·p(f) for f in [√½ − 1, √2 − 1]: relative error below 6.5e-9
LOG = (
    0.3333333134651184,
    -0.2500081956386566,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201757311820984,
    -0.13160182535648346,
    0.1276157647371292,
    -0.07634496688842773,
)
# sin a = a + a³·p(a²) for a in [0, π/4]: relative error below 8.4e-9
SIN = (-0.16666655242443085, 0.00833216030150652, -0.00019515282474458218)
# cos a = 1 − a²/2 + a⁴·p(a²) for a in [0, π/4]: relative error below 1.8e-10
COS = (0.04166664555668831, -0.0013887316454201937, 2.44331567955669e-05)
LN2_HIGH, LN2_LOW = 355 / 512, math.log(2) - 355 / 512  # LN2_HIGH has few bits: its product with k ≤ 32 is exact
ANGLE = math.pi / 4 / 2**29
ANGLE_HIGH = 3216 / 2**41  # 12 bits of it: exact with 12 bits of the angle
ANGLE_LOW = ANGLE - ANGLE_HIGH
NEAR_ONE = 0x4AFB0CCC  # (1 − √½)·2³²
ROOT_HALF_BITS = 0x3F3504F3  # of float32(√½)


def _multiply(c: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product. By halves: a compiler may take it that int64 products do not overflow."""
    high, low = (c >> 16) * by, (c & 0xFFFF) * by
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & MASK


def philox(counter: Word, key: tuple[Tensor, Tensor]) -> Word:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high2, low2 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def words(seeds: Tensor, step: int, elements: int) -> Tensor:
    """(B, ⌈elements/4⌉, 4) int64: the random words of a step, for (B,) int64 seeds."""
    blocks = torch.arange((elements + 3) // 4, device=seeds.device).expand(seeds.shape[0], -1)
    zero = torch.zeros_like(blocks)
    key = seeds[:, None]
    return torch.stack(philox((blocks, zero + (step & MASK), zero, zero), (key & MASK, (key >> 32) & MASK)), -1)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * x + c
    return y


def radius(w: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """√(−2·ln u) with u = (w + 1)·2⁻³²: float64 by torch's log1p, float32 by the kernels' polynomials."""
    gap = MASK - w  # (1 − u)·2³²
    if dtype == torch.float64:
        near_one = torch.log1p(gap.double() * -(2.0**-32))
        return torch.sqrt(-2 * torch.where(gap < 2**31, near_one, torch.log((w + 1).double() * 2.0**-32)))
    near = gap < NEAR_ONE  # there u itself would lose what separates it from 1
    value = torch.where(near, gap, w + 1).float()
    bits = value.view(torch.int32) - ROOT_HALF_BITS
    mantissa = ((bits & 0x7FFFFF) + ROOT_HALF_BITS).view(torch.float32)  # in [√½, √2)
    f = torch.where(near, value * -(2.0**-32), mantissa - 1)
    k = torch.where(near, 0, 32 - (bits >> 23)).float()  # u = (1 + f)·2⁻ᵏ
    square = f * f
    rest = f * square * _polynomial(f, LOG) - 0.5 * square
    # by float64: torch's own float32 root on the CPU is not always the nearest number, every other implementation's is
    return torch.sqrt((2 * (k * LN2_HIGH - (f + (rest - k * LN2_LOW)))).double()).float()


def cos_sin(w: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π·w·2⁻³², from the angle to the nearest multiple of π/2, which lies in [0, π/4]."""
    part = w & 0x1FFFFFFF
    part = torch.where(w & 0x20000000 != 0, 0x20000000 - part, part)
    if dtype == torch.float64:
        a = part.double() * ANGLE
        sine, cosine = torch.sin(a), torch.cos(a)
    else:
        high, low = (part & 0x3FFE0000).float(), (part & 0x1FFFF).float()  # 12 leading and 17 further bits
        lead = high * ANGLE_HIGH  # exact
        tail = high * ANGLE_LOW + low * ANGLE
        a = lead + tail
        square = a * a
        sine = lead + (tail + a * square * _polynomial(square, SIN))
        cosine = 1 - (0.5 * square - square * square * _polynomial(square, COS))
    swap = (w + 0x20000000) & 0x40000000 != 0
    x, y = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return torch.where((w + 0x40000000) & 0x80000000 != 0, -x, x), torch.where(w >= 0x80000000, -y, y)


def normals(w: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., 4) words -> (..., 4) standard normals, from the pairs (0, 1) and (2, 3)."""
    r = radius(w[..., 0::2], dtype)
    x, y = cos_sin(w[..., 1::2], dtype)
    return torch.stack((r * x, r * y), -1).flatten(-2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _noise(seeds: Tensor, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    elements = math.prod(shape)
    return normals(words(seeds, step, elements), dtype).flatten(1)[:, :elements].reshape(-1, *shape)


def philox_normal(
    seeds: Tensor, step: int, shape: tuple[int, ...], scale: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    noise = _noise(seeds, step, shape, _wide(dtype)) * scale
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(noise, dtype=dtype, memory_format=layout).copy_(noise)


def _column(t: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return t.to(dtype).reshape(-1, 1, 1, 1) if isinstance(t, Tensor) else t


def _denoised(x: Tensor, network_output: Tensor | None, c_skip: Tensor | None, c_out: Tensor | None) -> Tensor:
    """D = c_skip·x + c_out·F in float32 (float64 stays), before rounding to x's dtype."""
    dtype = _wide(x.dtype)
    if network_output is None or c_skip is None or c_out is None:
        return x.to(dtype)
    return _column(c_skip, dtype) * x.to(dtype) + _column(c_out, dtype) * network_output.to(dtype)


def sampler_step(
    x: Tensor,
    network_output: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    seeds: Tensor | None,
    step: int,
    scale: Tensor | float | None,
    sigma: Tensor | float | None,
) -> Tensor:
    d = _denoised(x, network_output, c_skip, c_out)
    if seeds is not None and scale is not None and sigma is not None:
        noise = _noise(seeds, step, tuple(x.shape[1:]), d.dtype)
        d = _column(scale, d.dtype) * d + _column(sigma, d.dtype) * noise
    return d.to(x.dtype)


def finish_images(x: Tensor, network_output: Tensor | None, c_skip: Tensor | None, c_out: Tensor | None) -> Tensor:
    d = _denoised(x, network_output, c_skip, c_out) * 127.5 + 128
    d = d.nan_to_num(0.0).clip(0, 255).permute(0, 2, 3, 1)
    # not contiguous(), which leaves a single channel's or image's strides as they are
    return d.to(torch.uint8, memory_format=torch.contiguous_format)


def precondition(x: Tensor, network_output: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    dtype = _wide(x.dtype)
    return (c_skip * x.to(dtype) + c_out * network_output.to(dtype)).to(x.dtype)


def renoise(denoised: Tensor, noise: Tensor, scale: Tensor | float, sigma: Tensor | float) -> Tensor:
    return scale * denoised + sigma * noise

"""The sampler step's Triton kernels. A program takes a run of one image's elements, numbered in C, H, W order.

Four elements share a Philox call, so a run is whole calls. In NCHW memory a run is consecutive: accesses are 16 bytes
wide. In channels_last a channel's elements lie C apart; with the 3 or 4 channels of an image the programs that take
the other channels at about the same time use the rest of each cache line. The arithmetic is `reference.py`'s, operation
by operation; launched without fused multiply-adds it gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference

L0: tl.constexpr = tl.constexpr(reference.LOG[0])
L1: tl.constexpr = tl.constexpr(reference.LOG[1])
L2: tl.constexpr = tl.constexpr(reference.LOG[2])
L3: tl.constexpr = tl.constexpr(reference.LOG[3])
L4: tl.constexpr = tl.constexpr(reference.LOG[4])
L5: tl.constexpr = tl.constexpr(reference.LOG[5])
L6: tl.constexpr = tl.constexpr(reference.LOG[6])
L7: tl.constexpr = tl.constexpr(reference.LOG[7])
S0: tl.constexpr = tl.constexpr(reference.SIN[0])
S1: tl.constexpr = tl.constexpr(reference.SIN[1])
S2: tl.constexpr = tl.constexpr(reference.SIN[2])
C0: tl.constexpr = tl.constexpr(reference.COS[0])
C1: tl.constexpr = tl.constexpr(reference.COS[1])
C2: tl.constexpr = tl.constexpr(reference.COS[2])
LN2_HIGH: tl.constexpr = tl.constexpr(reference.LN2_HIGH)
LN2_LOW: tl.constexpr = tl.constexpr(reference.LN2_LOW)
ANGLE: tl.constexpr = tl.constexpr(reference.ANGLE)
ANGLE_HIGH: tl.constexpr = tl.constexpr(reference.ANGLE_HIGH)
ANGLE_LOW: tl.constexpr = tl.constexpr(reference.ANGLE_LOW)
NEAR_ONE: tl.constexpr = tl.constexpr(reference.NEAR_ONE)
ROOT_HALF_BITS: tl.constexpr = tl.constexpr(reference.ROOT_HALF_BITS)


@triton.jit
def _radius(w):
    """√(−2·ln((w + 1)·2⁻³²)) of uint32 words."""
    gap = w ^ 0xFFFFFFFF
    near = gap < NEAR_ONE
    value = tl.where(near, gap, w + 1).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True) - ROOT_HALF_BITS
    mantissa = ((bits & 0x7FFFFF) + ROOT_HALF_BITS).to(tl.float32, bitcast=True)
    f = tl.where(near, value * -2.3283064365386963e-10, mantissa - 1.0)
    k = tl.where(near, 0, 32 - (bits >> 23)).to(tl.float32)
    square = f * f
    p = (((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f) + L1) * f + L0
    rest = f * square * p - 0.5 * square
    return tl.sqrt_rn(2.0 * (k * LN2_HIGH - (f + (rest - k * LN2_LOW))))


@triton.jit
def _cos_sin(w):
    """cos and sin of 2π·w·2⁻³² of uint32 words."""
    part = w & 0x1FFFFFFF
    part = tl.where((w & 0x20000000) != 0, 0x20000000 - part, part).to(tl.int32)
    high = (part & 0x3FFE0000).to(tl.float32)
    low = (part & 0x1FFFF).to(tl.float32)
    lead = high * ANGLE_HIGH
    tail = high * ANGLE_LOW + low * ANGLE
    a = lead + tail
    square = a * a
    sine = lead + (tail + a * square * ((S2 * square + S1) * square + S0))
    cosine = 1.0 - (0.5 * square - square * square * ((C2 * square + C1) * square + C0))
    swap = ((w + 0x20000000) & 0x40000000) != 0
    x = tl.where(swap, sine, cosine)
    y = tl.where(swap, cosine, sine)
    signed = w.to(tl.int32, bitcast=True)
    quarter = (w + 0x40000000).to(tl.int32, bitcast=True)
    return tl.where(quarter < 0, -x, x), tl.where(signed < 0, -y, y)


@triton.jit
def normal_pair(w0, w1):
    """Two standard normals of two uint32 words."""
    r = _radius(w0)
    x, y = _cos_sin(w1)
    return r * x, r * y


@triton.jit
def _normals(seed, step, first, BLOCK: tl.constexpr):
    """[4·BLOCK] normals: of the calls first to first + BLOCK − 1."""
    block = (first + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32, bitcast=True), zero, zero)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _at(e, pixels, channel, pixel, FLAT: tl.constexpr):
    """Where element e of an image lies."""
    if FLAT:
        at = e
    else:
        c = e // pixels
        at = c * channel + (e - c * pixels) * pixel
    return at


@triton.jit(do_not_specialize=["step"])
def noise(seeds, y, step, scale, chunks, elements, pixels, y_channel, y_pixel, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """y = scale·n."""
    b = tl.program_id(0) // chunks
    chunk = tl.program_id(0) - b * chunks
    n = _normals(tl.load(seeds + b), step, chunk * BLOCK, BLOCK)
    e = chunk * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    y += b.to(tl.int64) * elements
    tl.store(y + _at(e, pixels, y_channel, y_pixel, FLAT), n * scale, e < elements)


@triton.jit(do_not_specialize=["step"])
def advance(
    x, f, y, c_skip, c_out, seeds, scale, sigma, step, chunks, elements, pixels,
    x_batch, x_channel, x_pixel, f_batch, f_channel, f_pixel, y_channel, y_pixel,
    c_skip_row, c_out_row, scale_row, sigma_row,
    BLOCK: tl.constexpr, X_FLAT: tl.constexpr, F_FLAT: tl.constexpr, Y_FLAT: tl.constexpr,
):  # fmt: skip
    """D = c_skip·x + c_out·f, or x without f; y = scale·D + sigma·n, or D without seeds."""
    b = tl.program_id(0) // chunks
    chunk = tl.program_id(0) - b * chunks
    wide = b.to(tl.int64)
    e = chunk * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    mask = e < elements
    d = tl.load(x + wide * x_batch + _at(e, pixels, x_channel, x_pixel, X_FLAT), mask, other=0.0).to(tl.float32)
    if f is not None:
        out = tl.load(f + wide * f_batch + _at(e, pixels, f_channel, f_pixel, F_FLAT), mask, other=0.0).to(tl.float32)
        d = tl.load(c_skip + b * c_skip_row) * d + tl.load(c_out + b * c_out_row) * out
    if seeds is not None:
        n = _normals(tl.load(seeds + b), step, chunk * BLOCK, BLOCK)
        d = tl.load(scale + b * scale_row) * d + tl.load(sigma + b * sigma_row) * n
    tl.store(y + wide * elements + _at(e, pixels, y_channel, y_pixel, Y_FLAT), d, mask)


@triton.jit
def to_bytes(
    x, f, y, c_skip, c_out, chunks, elements, channels,
    x_batch, x_channel, x_pixel, f_batch, f_channel, f_pixel, c_skip_row, c_out_row,
    BLOCK: tl.constexpr, X_FLAT: tl.constexpr, F_FLAT: tl.constexpr,
):  # fmt: skip
    """y (B, H, W, C) uint8 = trunc(clip(D·127.5 + 128, 0, 255)), 0 for NaN; FLAT says that the memory is (H, W, C)."""
    b = tl.program_id(0) // chunks
    e = (tl.program_id(0) - b * chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = e < elements
    wide = b.to(tl.int64)
    # pixels take the place of channels: an element is pixel e // C, channel e % C
    d = tl.load(x + wide * x_batch + _at(e, channels, x_pixel, x_channel, X_FLAT), mask, other=0.0).to(tl.float32)
    if f is not None:
        out = tl.load(f + wide * f_batch + _at(e, channels, f_pixel, f_channel, F_FLAT), mask, other=0.0).to(tl.float32)
        d = tl.load(c_skip + b * c_skip_row) * d + tl.load(c_out + b * c_out_row) * out
    d *= 127.5
    d = tl.where(d > -128.0, d, -128.0)  # NaN goes to the bottom; both limits are exact before adding 128
    d = tl.where(d < 127.0, d, 127.0)
    tl.store(y + wide * elements + e, (d + 128.0).to(tl.uint8), mask)

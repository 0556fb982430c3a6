"""GroupNorm–SiLU on a GPU.

A program owns a bundle of whole groups of one sample. `*_tile` holds all its pixels on chip: one read, one write.
`*_loop` walks over them twice, the second time from the L2 cache. `*_partial` and `*_apply` share a sample's pixels
among programs through a workspace, for few large samples. Channels that fill a tile up to a power of two are masked.

The input is u = x + emb + input_bias, x being one tensor, two read as concatenated (PAIR), or a residual sum that is
written on the way (JOIN). Sums run around a rough mean of the group so that a large mean costs no digits; the mean is
kept as that rough mean and a small correction.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(v):
    return v * tl.sigmoid(v)


@triton.jit
def _group_sum(values, GROUP_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_C,) values -> in every channel the sum over its group."""
    if BLOCK_G == 1:
        return tl.zeros([BLOCK_C], tl.float32) + tl.sum(values, 0)
    elif GROUP_CHANNELS == 1:
        return values
    else:
        member = (tl.arange(0, BLOCK_C) // GROUP_CHANNELS)[:, None] == tl.arange(0, BLOCK_G)[None, :]
        sums = tl.sum(tl.where(member, values[:, None], 0.0), 0)
        return tl.sum(tl.where(member, sums[None, :], 0.0), 1)


@triton.jit
def _vector(pointer, at, mask, absent):
    """Float values of an optional per-channel parameter."""
    if pointer is None:
        return tl.zeros_like(at).to(tl.float32) + absent
    else:
        return tl.load(pointer + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _added(emb, emb_row, input_bias, b, c, mask):
    return _vector(emb, b * emb_row + c, mask, 0.0) + _vector(input_bias, c, mask, 0.0)


@triton.jit
def _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask):
    """v = xhat·gain + offset, from the norm's and the adaptive scale and shift."""
    adaptive = 1.0 + _vector(scale, b * scale_row + c, mask, 0.0)
    gain = _vector(weight, c, mask, 1.0) * adaptive
    offset = _vector(bias, c, mask, 0.0) * adaptive + _vector(shift, b * shift_row + c, mask, 0.0)
    return gain, offset


@triton.jit
def _line(rough, rest, factor, offset):
    """((x − rough) + rest)·factor + offset as (x − centre)·factor + offset, with what the centre rounds off: fewer
    registers."""
    centre = rough - rest
    return centre, factor, offset - ((rough - centre) - rest) * factor


@triton.jit
def _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR: tl.constexpr):
    """A (pixels, channels) tile of the input in its own dtype; x and x2 point at the sample."""
    if PAIR:
        left = (c < first_channels)[None, :]
        a = tl.load(x + (p[:, None] * x_pixel + c[None, :] * x_channel), mask & left, other=0.0)
        at = p[:, None] * x2_pixel + (c - first_channels)[None, :] * x2_channel
        return tl.where(left, a, tl.load(x2 + at, mask & (c >= first_channels)[None, :], other=0.0))
    else:
        return tl.load(x + (p[:, None] * x_pixel + c[None, :] * x_channel), mask, other=0.0)


@triton.jit
def _join(tile, skip, r, join_bias, skip_scale, at, c, mask_c, mask):
    """r = (tile + join_bias + skip)·skip_scale, rounded to the activations' type and written as the residual stream."""
    other = tl.load(skip + at, mask, other=0.0).to(tl.float32)
    total = (tile.to(tl.float32) + _vector(join_bias, c, mask_c, 0.0)[None, :] + other) * skip_scale
    tile = total.to(r.dtype.element_ty)
    tl.store(r + at, tile, mask)
    return tile


@triton.jit
def _bundle(bundles, channels, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr):
    """This program's sample, its channels and which of them exist: all with EVEN_C."""
    program = tl.program_id(0)
    b = program // bundles
    lane = tl.arange(0, BLOCK_C)
    c = (program % bundles) * BUNDLE + lane
    if EVEN_C:
        return b, c, tl.full([BLOCK_C], 1, tl.int1)
    else:
        return b, c, (lane < BUNDLE) & (c < channels)


@triton.jit
def _inside(p, last, mask_c, BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr):
    """Which pixels and channels of a tile exist; a constant where all do, so that no mask takes registers."""
    if EVEN_P:
        return tl.full([BLOCK_P, 1], 1, tl.int1) & mask_c[None, :]
    else:
        return (p < last)[:, None] & mask_c[None, :]


@triton.jit
def _write_stats(stats, b, groups, c, mask_c, rough, gap, rstd, GROUP_CHANNELS: tl.constexpr):
    first = mask_c & (c % GROUP_CHANNELS == 0)
    at = stats + (b * groups + c // GROUP_CHANNELS) * 3
    tl.store(at, rough, first)
    tl.store(at + 1, gap, first)
    tl.store(at + 2, rstd, first)


@triton.jit
def forward_tile(
    x, x2, skip, r, y, stats, join_bias, skip_scale, weight, bias, emb, input_bias, scale, shift, eps,
    bundles, channels, first_channels, pixels, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, JOIN: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One read, one write: the whole (pixels × bundle) tile stays in registers."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    wide = b.to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    mask = _inside(p, pixels, mask_c, BLOCK_P, EVEN_P)
    tile = _load(
        x + wide * x_batch, x2 if x2 is None else x2 + wide * x2_batch, p, c, mask, first_channels,
        x_pixel, x_channel, x2_pixel, x2_channel, PAIR,
    )  # fmt: skip
    at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
    if JOIN:
        tile = _join(tile, skip, r, join_bias, skip_scale, at, c, mask_c, mask)

    added = _added(emb, emb_row, input_bias, b, c, mask_c)
    count = (GROUP_CHANNELS * pixels) * 1.0
    # pixels past the end are left out element by element, channels past the end when their sums are there
    values = tile.to(tl.float32)
    if not EVEN_P:
        values = tl.where((p < pixels)[:, None], values, 0.0)
    sums = tl.where(mask_c, tl.sum(values, 0) + added * pixels, 0.0)
    rough = _group_sum(sums, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    # d = u − rough = (x − centre) − slip: one value a channel beside the tile, its rounding put right in the sums
    centre = rough - added
    slip = tl.where(mask_c, (rough - centre) - added, 0.0)
    d = tile.to(tl.float32) - centre[None, :]
    if not EVEN_P:
        d = tl.where((p < pixels)[:, None], d, 0.0)
    s1 = tl.where(mask_c, tl.sum(d, 0), 0.0)
    s2 = tl.where(mask_c, tl.sum(d * d, 0), 0.0) + slip * (slip * pixels - 2.0 * s1)
    gap = _group_sum(s1 - slip * pixels, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    square = _group_sum(s2, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    rstd = tl.rsqrt(tl.maximum(square - gap * gap, 0.0) + eps)
    if stats is not None:
        _write_stats(stats, b, channels // GROUP_CHANNELS, c, mask_c, rough, gap, rstd, GROUP_CHANNELS)

    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    centre, factor, offset = _line(rough, added - gap, rstd * gain, offset)
    v = (tile.to(tl.float32) - centre[None, :]) * factor[None, :] + offset[None, :]
    tl.store(y + at, _silu(v) if SILU else v, mask)


@triton.jit
def forward_loop(
    x, x2, skip, r, y, stats, join_bias, skip_scale, weight, bias, emb, input_bias, scale, shift, eps,
    bundles, channels, first_channels, pixels, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, JOIN: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Two walks over the bundle's pixels in steps of BLOCK_P; the second finds them in the L2 cache."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    wide = b.to(tl.int64)
    x += wide * x_batch
    x2 = x2 if x2 is None else x2 + wide * x2_batch
    base = wide * y_batch
    added = _added(emb, emb_row, input_bias, b, c, mask_c)
    count = (GROUP_CHANNELS * pixels) * 1.0

    rough = tl.zeros([BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, pixels, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, pixels, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        if JOIN:
            at = base + (p[:, None] * y_pixel + c[None, :] * y_channel)
            tile = _join(tile, skip, r, join_bias, skip_scale, at, c, mask_c, mask)
        if start == 0:  # the first step's mean lies within √(steps) standard deviations of the whole one
            u = tl.where(mask, tile.to(tl.float32) + added[None, :], 0.0)
            some = GROUP_CHANNELS * tl.minimum(pixels, BLOCK_P) * 1.0
            rough = _group_sum(tl.sum(u, 0), GROUP_CHANNELS, BLOCK_C, BLOCK_G) / some
        d = tl.where(mask, (tile.to(tl.float32) - rough[None, :]) + added[None, :], 0.0)
        s1 += d
        s2 += d * d
    gap = _group_sum(tl.sum(s1, 0), GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    square = _group_sum(tl.sum(s2, 0), GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    rstd = tl.rsqrt(tl.maximum(square - gap * gap, 0.0) + eps)
    if stats is not None:
        _write_stats(stats, b, channels // GROUP_CHANNELS, c, mask_c, rough, gap, rstd, GROUP_CHANNELS)

    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    centre, factor, offset = _line(rough, added - gap, rstd * gain, offset)
    for start in tl.range(0, pixels, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, pixels, mask_c, BLOCK_P, EVEN_P)
        at = base + (p[:, None] * y_pixel + c[None, :] * y_channel)
        if JOIN:
            tile = tl.load(r + at, mask, other=0.0)
        else:
            tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        v = (tile.to(tl.float32) - centre[None, :]) * factor[None, :] + offset[None, :]
        tl.store(y + at, _silu(v) if SILU else v, mask)


@triton.jit
def forward_partial(
    x, x2, skip, r, workspace, join_bias, skip_scale, emb, input_bias,
    bundles, channels, first_channels, pixels, span, emb_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Rough mean, correction and variance of one span of pixels -> workspace (B, spans, G, 3)."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    wide = b.to(tl.int64)
    x += wide * x_batch
    x2 = x2 if x2 is None else x2 + wide * x2_batch
    added = _added(emb, emb_row, input_bias, b, c, mask_c)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, pixels)

    rough = tl.zeros([BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, last, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        if JOIN:
            at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
            tile = _join(tile, skip, r, join_bias, skip_scale, at, c, mask_c, mask)
        if start == first:
            u = tl.where(mask, tile.to(tl.float32) + added[None, :], 0.0)
            some = GROUP_CHANNELS * tl.minimum(last - first, BLOCK_P) * 1.0
            rough = _group_sum(tl.sum(u, 0), GROUP_CHANNELS, BLOCK_C, BLOCK_G) / some
        d = tl.where(mask, (tile.to(tl.float32) - rough[None, :]) + added[None, :], 0.0)
        s1 += d
        s2 += d * d
    count = GROUP_CHANNELS * (last - first) * 1.0
    gap = _group_sum(tl.sum(s1, 0), GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    square = _group_sum(tl.sum(s2, 0), GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    row = b * tl.num_programs(1) + tl.program_id(1)
    _write_stats(
        workspace, row, channels // GROUP_CHANNELS, c, mask_c, rough, gap,
        tl.maximum(square - gap * gap, 0.0), GROUP_CHANNELS,
    )  # fmt: skip


@triton.jit
def forward_apply(
    x, x2, y, stats, workspace, weight, bias, emb, input_bias, scale, shift, eps,
    bundles, channels, first_channels, pixels, span, spans, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Combines the spans' moments (Chan, Golub & LeVeque 1979) and normalises one span."""
    # the last programs of forward_partial ran last: what they read is what the L2 cache still holds
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    groups = channels // GROUP_CHANNELS
    s = tl.arange(0, BLOCK_S)
    at_s = workspace + ((b * spans + s)[:, None] * groups + (c // GROUP_CHANNELS)[None, :]) * 3
    mask_s = (s < spans)[:, None] & mask_c[None, :]
    size = tl.minimum(pixels - s * span, span).to(tl.float32)[:, None] / pixels
    size = tl.where(mask_s, size, 0.0)
    rough_s = tl.load(at_s, mask_s, other=0.0)
    rough = tl.sum(tl.where(s[:, None] == 0, rough_s, 0.0), 0)
    mean_s = (rough_s - rough[None, :]) + tl.load(at_s + 1, mask_s, other=0.0)
    gap = tl.sum(mean_s * size, 0)
    off = tl.where(mask_s, mean_s - gap[None, :], 0.0)
    rstd = tl.rsqrt(tl.sum((tl.load(at_s + 2, mask_s, other=0.0) + off * off) * size, 0) + eps)
    if stats is not None:
        # every span's program holds the same numbers; the first one writes them
        _write_stats(stats, b, groups, c, mask_c & (part == 0), rough, gap, rstd, GROUP_CHANNELS)

    wide = b.to(tl.int64)
    x += wide * x_batch
    x2 = x2 if x2 is None else x2 + wide * x2_batch
    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    rest = _added(emb, emb_row, input_bias, b, c, mask_c) - gap
    centre, factor, offset = _line(rough, rest, rstd * gain, offset)
    last = tl.minimum(part * span + span, pixels)
    for start in tl.range(part * span, last, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, last, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        v = (tile.to(tl.float32) - centre[None, :]) * factor[None, :] + offset[None, :]
        at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
        tl.store(y + at, _silu(v) if SILU else v, mask)

"""GroupNorm–SiLU's gradients on a GPU: SiLU and the normed values worked out again, sums in two stages.

The kernels have the forms of the forward's, see triton_kernels.py.
"""

import triton
import triton.language as tl

from .triton_kernels import _added, _affine, _bundle, _group_sum, _inside, _load, _vector


@triton.jit
def _silu_slope(v):
    s = tl.sigmoid(v)
    return s * (1.0 + v * (1.0 - s))


@triton.jit
def _load_stats(stats, b, groups, c, mask_c, GROUP_CHANNELS: tl.constexpr):
    at = stats + (b * groups + c // GROUP_CHANNELS) * 3
    rough = tl.load(at, mask_c, other=0.0)
    return rough, tl.load(at + 1, mask_c, other=0.0), tl.load(at + 2, mask_c, other=0.0)


@triton.jit
def _input_gradient(tile, slope, rough, rest, rstd, mean_dx, mean_dx_xhat, gain):
    """rstd·(dxhat − mean(dxhat) − xhat·mean(dxhat·xhat)) with dxhat = slope·gain."""
    xhat = ((tile.to(tl.float32) - rough[None, :]) + rest[None, :]) * rstd[None, :]
    return (slope * gain[None, :] - mean_dx[None, :] - xhat * mean_dx_xhat[None, :]) * rstd[None, :]


@triton.jit
def _slope(dy, xhat, gain, offset, SILU: tl.constexpr):
    """dv = dy·silu'(v), v recomputed."""
    dv = dy.to(tl.float32)
    if SILU:
        dv = dv * _silu_slope(xhat * gain[None, :] + offset[None, :])
    return dv


@triton.jit
def _finish_tile(
    dx, dx2, stream, skip_scale, total, p, c, mask, first_channels, at,
    x_pixel, x_channel, x2_pixel, x2_channel, PAIR: tl.constexpr,
):  # fmt: skip
    """Adds the residual stream's gradient, scales, writes; returns the gradient before rounding."""
    if stream is not None:
        total += tl.load(stream + at, mask, other=0.0).to(tl.float32)
    total *= skip_scale
    if PAIR:
        left = (c < first_channels)[None, :]
        tl.store(dx + (p[:, None] * x_pixel + c[None, :] * x_channel), total, mask & left)
        at2 = p[:, None] * x2_pixel + (c - first_channels)[None, :] * x2_channel
        tl.store(dx2 + at2, total, mask & (c >= first_channels)[None, :])
    else:
        tl.store(dx + (p[:, None] * x_pixel + c[None, :] * x_channel), total, mask)
    return total


@triton.jit
def backward_tile(
    dy, x, x2, stream, dx, dx2, sums, stats, skip_scale, weight, bias, emb, input_bias, scale, shift,
    bundles, channels, first_channels, pixels, plane, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel,
    dx_batch, dx_pixel, dx_channel, dx2_batch, dx2_pixel, dx2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, SILU: tl.constexpr,
    INPUT_SUM: tl.constexpr,
):  # fmt: skip
    """Two reads, one write. sums (3, B, C), `plane` apart: Σdv, Σdv·xhat and, with INPUT_SUM, Σdx over the pixels."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    wide = b.to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    mask = _inside(p, pixels, mask_c, BLOCK_P, EVEN_P)
    tile = _load(
        x + wide * x_batch, x2 if x2 is None else x2 + wide * x2_batch, p, c, mask, first_channels,
        x_pixel, x_channel, x2_pixel, x2_channel, PAIR,
    )  # fmt: skip
    at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
    upstream = tl.load(dy + at, mask, other=0.0)

    groups = channels // GROUP_CHANNELS
    rough, gap, rstd = _load_stats(stats, b, groups, c, mask_c, GROUP_CHANNELS)
    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    rest = _added(emb, emb_row, input_bias, b, c, mask_c) - gap
    xhat = ((tile.to(tl.float32) - rough[None, :]) + rest[None, :]) * rstd[None, :]
    dv = _slope(upstream, xhat, gain, offset, SILU)  # 0 where masked
    s0 = tl.sum(dv, 0)
    s1 = tl.sum(dv * xhat, 0)
    row = b * channels + c
    tl.store(sums + row, s0, mask_c)
    tl.store(sums + plane + row, s1, mask_c)
    count = (GROUP_CHANNELS * pixels) * 1.0
    mean_dx = _group_sum(s0 * gain, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    mean_dx_xhat = _group_sum(s1 * gain, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    total = _input_gradient(tile, dv, rough, rest, rstd, mean_dx, mean_dx_xhat, gain)
    total = _finish_tile(
        dx + wide * dx_batch, dx2 if dx2 is None else dx2 + wide * dx2_batch, stream, skip_scale, total, p, c, mask,
        first_channels, at, dx_pixel, dx_channel, dx2_pixel, dx2_channel, PAIR,
    )  # fmt: skip
    if INPUT_SUM:
        tl.store(sums + 2 * plane + row, tl.sum(tl.where(mask, total, 0.0), 0), mask_c)


@triton.jit
def backward_loop(
    dy, x, x2, stream, dx, dx2, sums, stats, skip_scale, weight, bias, emb, input_bias, scale, shift,
    bundles, channels, first_channels, pixels, plane, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel,
    dx_batch, dx_pixel, dx_channel, dx2_batch, dx2_pixel, dx2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, SILU: tl.constexpr,
    INPUT_SUM: tl.constexpr,
):  # fmt: skip
    """`backward_tile` in steps of BLOCK_P pixels, the second walk from the L2 cache."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    wide = b.to(tl.int64)
    x += wide * x_batch
    x2 = x2 if x2 is None else x2 + wide * x2_batch
    dx += wide * dx_batch
    dx2 = dx2 if dx2 is None else dx2 + wide * dx2_batch
    rough, gap, rstd = _load_stats(stats, b, channels // GROUP_CHANNELS, c, mask_c, GROUP_CHANNELS)
    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    rest = _added(emb, emb_row, input_bias, b, c, mask_c) - gap

    t0 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    t1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, pixels, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, pixels, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
        xhat = ((tile.to(tl.float32) - rough[None, :]) + rest[None, :]) * rstd[None, :]
        dv = _slope(tl.load(dy + at, mask, other=0.0), xhat, gain, offset, SILU)
        t0 += dv
        t1 += dv * xhat
    s0 = tl.sum(t0, 0)
    s1 = tl.sum(t1, 0)
    row = b * channels + c
    tl.store(sums + row, s0, mask_c)
    tl.store(sums + plane + row, s1, mask_c)
    count = (GROUP_CHANNELS * pixels) * 1.0
    mean_dx = _group_sum(s0 * gain, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    mean_dx_xhat = _group_sum(s1 * gain, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count

    t2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, pixels, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, pixels, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
        xhat = ((tile.to(tl.float32) - rough[None, :]) + rest[None, :]) * rstd[None, :]
        dv = _slope(tl.load(dy + at, mask, other=0.0), xhat, gain, offset, SILU)
        total = _input_gradient(tile, dv, rough, rest, rstd, mean_dx, mean_dx_xhat, gain)
        total = _finish_tile(
            dx, dx2, stream, skip_scale, total, p, c, mask, first_channels, at,
            dx_pixel, dx_channel, dx2_pixel, dx2_channel, PAIR,
        )  # fmt: skip
        if INPUT_SUM:
            t2 += tl.where(mask, total, 0.0)
    if INPUT_SUM:
        tl.store(sums + 2 * plane + row, tl.sum(t2, 0), mask_c)


@triton.jit
def backward_partial(
    dy, x, x2, workspace, stats, weight, bias, emb, input_bias, scale, shift,
    bundles, channels, first_channels, pixels, span, plane, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Σdv and Σdv·xhat of one span of pixels -> workspace (3, B, spans, C), `plane` apart."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    wide = b.to(tl.int64)
    x += wide * x_batch
    x2 = x2 if x2 is None else x2 + wide * x2_batch
    rough, gap, rstd = _load_stats(stats, b, channels // GROUP_CHANNELS, c, mask_c, GROUP_CHANNELS)
    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    rest = _added(emb, emb_row, input_bias, b, c, mask_c) - gap
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, pixels)
    t0 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    t1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, last, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
        xhat = ((tile.to(tl.float32) - rough[None, :]) + rest[None, :]) * rstd[None, :]
        dv = _slope(tl.load(dy + at, mask, other=0.0), xhat, gain, offset, SILU)
        t0 += dv
        t1 += dv * xhat
    row = (b * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(workspace + row, tl.sum(t0, 0), mask_c)
    tl.store(workspace + plane + row, tl.sum(t1, 0), mask_c)


@triton.jit
def backward_apply(
    dy, x, x2, stream, dx, dx2, workspace, stats, skip_scale, weight, bias, emb, input_bias, scale, shift,
    bundles, channels, first_channels, pixels, span, spans, plane, emb_row, scale_row, shift_row,
    x_batch, x_pixel, x_channel, x2_batch, x2_pixel, x2_channel,
    dx_batch, dx_pixel, dx_channel, dx2_batch, dx2_pixel, dx2_channel, y_batch, y_pixel, y_channel,
    GROUP_CHANNELS: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr, EVEN_C: tl.constexpr, PAIR: tl.constexpr,
    SILU: tl.constexpr, INPUT_SUM: tl.constexpr,
):  # fmt: skip
    """Adds the spans' sums up and writes the input gradient of one span; its own Σdx goes to the workspace."""
    b, c, mask_c = _bundle(bundles, channels, BUNDLE, BLOCK_C, EVEN_C)
    part = tl.num_programs(1) - 1 - tl.program_id(1)  # as in forward_apply: the last span read is still in the cache
    wide = b.to(tl.int64)
    x += wide * x_batch
    x2 = x2 if x2 is None else x2 + wide * x2_batch
    dx += wide * dx_batch
    dx2 = dx2 if dx2 is None else dx2 + wide * dx2_batch
    rough, gap, rstd = _load_stats(stats, b, channels // GROUP_CHANNELS, c, mask_c, GROUP_CHANNELS)
    gain, offset = _affine(weight, bias, scale, scale_row, shift, shift_row, b, c, mask_c)
    rest = _added(emb, emb_row, input_bias, b, c, mask_c) - gap

    s = tl.arange(0, BLOCK_S)
    at_s = workspace + (b * spans + s)[:, None] * channels + c[None, :]
    mask_s = (s < spans)[:, None] & mask_c[None, :]
    count = (GROUP_CHANNELS * pixels) * 1.0
    s0 = tl.sum(tl.load(at_s, mask_s, other=0.0), 0)
    s1 = tl.sum(tl.load(at_s + plane, mask_s, other=0.0), 0)
    mean_dx = _group_sum(s0 * gain, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count
    mean_dx_xhat = _group_sum(s1 * gain, GROUP_CHANNELS, BLOCK_C, BLOCK_G) / count

    t2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    last = tl.minimum(part * span + span, pixels)
    for start in tl.range(part * span, last, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        mask = _inside(p, last, mask_c, BLOCK_P, EVEN_P)
        tile = _load(x, x2, p, c, mask, first_channels, x_pixel, x_channel, x2_pixel, x2_channel, PAIR)
        at = wide * y_batch + (p[:, None] * y_pixel + c[None, :] * y_channel)
        xhat = ((tile.to(tl.float32) - rough[None, :]) + rest[None, :]) * rstd[None, :]
        dv = _slope(tl.load(dy + at, mask, other=0.0), xhat, gain, offset, SILU)
        total = _input_gradient(tile, dv, rough, rest, rstd, mean_dx, mean_dx_xhat, gain)
        total = _finish_tile(
            dx, dx2, stream, skip_scale, total, p, c, mask, first_channels, at,
            dx_pixel, dx_channel, dx2_pixel, dx2_channel, PAIR,
        )  # fmt: skip
        if INPUT_SUM:
            t2 += tl.where(mask, total, 0.0)
    if INPUT_SUM:
        row = (b * spans + part) * channels + c
        tl.store(workspace + 2 * plane + row, tl.sum(t2, 0), mask_c)


@triton.jit
def fold_spans(workspace, sums, spans, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """workspace (rows, spans, C) -> sums (rows, C), a row for each kind of sum and sample."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    row = tl.program_id(0)
    mask = (s < spans)[:, None] & (c < channels)[None, :]
    values = tl.load(workspace + (row * spans + s)[:, None] * channels + c[None, :], mask, other=0.0)
    tl.store(sums + row * channels + c, tl.sum(values, 0), c < channels)


@triton.jit
def parameter_gradients(
    sums, weight, bias, scale, scale_row, vectors, dscale, batch, channels, plane,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From sums (3, B, C): vectors (3, C) = dweight, dbias, Σ over the batch of the third sum; dscale (B, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    w = _vector(weight, c, mask_c, 1.0)
    o = _vector(bias, c, mask_c, 0.0)
    dweight = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    dinput = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, batch, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        mask = (b < batch)[:, None] & mask_c[None, :]
        at = b[:, None] * channels + c[None, :]
        s0 = tl.load(sums + at, mask, other=0.0)
        s1 = tl.load(sums + plane + at, mask, other=0.0)
        dinput += tl.load(sums + 2 * plane + at, mask, other=0.0)
        if scale is None:
            dweight += s1
            dbias += s0
        else:
            adaptive = 1.0 + tl.load(scale + b[:, None] * scale_row + c[None, :], mask, other=0.0).to(tl.float32)
            dweight += s1 * adaptive
            dbias += s0 * adaptive
            tl.store(dscale + at, s1 * w[None, :] + s0 * o[None, :], mask)
    tl.store(vectors + c, tl.sum(dweight, 0), mask_c)
    tl.store(vectors + channels + c, tl.sum(dbias, 0), mask_c)
    tl.store(vectors + 2 * channels + c, tl.sum(dinput, 0), mask_c)

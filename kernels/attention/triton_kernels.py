"""Attention on a GPU, flash-style (Dao et al. 2022): no T×T tensor in memory, softmax in fp32, no atomics.

Tensors are (B, heads, T, d) with any strides. A program of `forward` and `backward_query` owns BLOCK_Q queries of one
head and walks over its keys; one of `backward_key` owns BLOCK_K keys and walks over the queries. BLOCK_D is d up to a
power of two of at least 16, and masked where d is not one.
"""

import triton
import triton.language as tl


@triton.jit
def _head(blocks, heads):
    """This program's block, sample and head, and both as one row; wide where offsets may pass 2³¹.

    One axis of the grid holds them all: the others end at 65,535. A head's blocks are neighbours and share its keys.
    """
    program = tl.program_id(0)
    row = program // blocks
    return program % blocks, (row // heads).to(tl.int64), row % heads, row.to(tl.int64)


@triton.jit
def _tile(pointer, token, channel, token_stride, channel_stride, tokens, D, EVEN: tl.constexpr, EVEN_D: tl.constexpr):
    """(tokens, channels) tile; what lies outside is 0."""
    at = pointer + (token[:, None] * token_stride + channel[None, :] * channel_stride)
    if EVEN and EVEN_D:
        return tl.load(at)
    elif EVEN_D:
        return tl.load(at, (token < tokens)[:, None], other=0.0)
    elif EVEN:
        return tl.load(at, (channel < D)[None, :], other=0.0)
    else:
        return tl.load(at, (token < tokens)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # the interpreter cannot multiply bfloat16; in float32 the products are the same
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _put(pointer, value, token, channel, token_stride, channel_stride, tokens, D):
    at = pointer + (token[:, None] * token_stride + channel[None, :] * channel_stride)
    tl.store(at, value.to(pointer.dtype.element_ty), (token < tokens)[:, None] & (channel < D)[None, :])


@triton.jit
def forward(
    q, k, v, out, logsumexp, blocks, heads, tokens, log2_scale,
    q_batch, q_head, q_token, q_channel, k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel, out_batch, out_head, out_token, out_channel,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """out = softmax(q kᵀ/√d) v; log2_scale is log2(e)/√d: exponentials are powers of two, logsumexp of base 2."""
    block, b, h, row = _head(blocks, heads)
    if INTERLEAVED:  # known to the compiler, an address for each channel takes no register
        q_channel = 3
        k_channel = 3
        v_channel = 3
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    queries = _tile(q, query, channel, q_token, q_channel, tokens, D, EVEN, D == BLOCK_D)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, tokens, BLOCK_K, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_K)
        keys = _tile(k, key, channel, k_token, k_channel, tokens, D, EVEN, D == BLOCK_D)
        logits = _dot(queries, tl.trans(keys), None, PRECISION) * log2_scale
        if not EVEN:
            logits = tl.where((key < tokens)[None, :], logits, float("-inf"))
        peak = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - peak[:, None])
        rescale = tl.exp2(largest - peak)
        total = total * rescale + tl.sum(weights, 1)
        values = _tile(v, key, channel, v_token, v_channel, tokens, D, EVEN, D == BLOCK_D)
        mixed = _dot(weights.to(values.dtype), values, mixed * rescale[:, None], PRECISION)
        largest = peak
    _put(out + b * out_batch + h * out_head, mixed / total[:, None], query, channel, out_token, out_channel, tokens, D)
    if logsumexp is not None:
        tl.store(logsumexp + row * tokens + query, largest + tl.log2(total), query < tokens)


@triton.jit
def backward_query(
    dout, q, k, v, out, logsumexp, delta, dq, blocks, heads, tokens, scale, log2_scale,
    q_batch, q_head, q_token, q_channel, k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel, out_batch, out_head, out_token, out_channel,
    dout_batch, dout_head, dout_token, dout_channel, dq_batch, dq_head, dq_token, dq_channel,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, KEYS_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr, TO_INTERLEAVED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dq = Σ ds·k/√d with ds = p·(dout vᵀ − delta); writes delta = Σ dout·out of its rows for `backward_key`."""
    block, b, h, row = _head(blocks, heads)
    if INTERLEAVED:  # known to the compiler, an address for each channel takes no register
        q_channel = 3
        k_channel = 3
        v_channel = 3
    if TO_INTERLEAVED:
        dq_channel = 3
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    row = row * tokens + query
    upstream = _tile(
        dout + b * dout_batch + h * dout_head, query, channel, dout_token, dout_channel, tokens, D, EVEN, D == BLOCK_D
    )
    result = _tile(
        out + b * out_batch + h * out_head, query, channel, out_token, out_channel, tokens, D, EVEN, D == BLOCK_D
    )
    mean = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + row, mean, query < tokens)
    if HALVES:  # gathered values take a register an element: half of them at a time
        low = tl.arange(0, BLOCK_D // 2)
        at = dout + b * dout_batch + h * dout_head
        low_upstream = _tile(at, query, low, dout_token, dout_channel, tokens, D, EVEN, D == BLOCK_D)
        high_upstream = _tile(at, query, low + BLOCK_D // 2, dout_token, dout_channel, tokens, D, EVEN, D == BLOCK_D)
    queries = _tile(q, query, channel, q_token, q_channel, tokens, D, EVEN, D == BLOCK_D)
    lse2 = tl.load(logsumexp + row, query < tokens, other=0.0)
    gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, tokens, BLOCK_K, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_K)
        keys = _tile(k, key, channel, k_token, k_channel, tokens, D, EVEN, D == BLOCK_D)
        if (
            KEYS_FIRST
        ):  # the same transposed: without matrix units the other order keeps queries in registers and spills
            weights = tl.exp2(_dot(keys, tl.trans(queries), None, PRECISION) * log2_scale - lse2[None, :])
            if not EVEN:
                weights = tl.where((key < tokens)[:, None], weights, 0.0)
            values = _tile(v, key, channel, v_token, v_channel, tokens, D, EVEN, D == BLOCK_D)
            slope = weights * (_dot(values, tl.trans(upstream), None, PRECISION) - mean[None, :])
            slope = tl.trans(slope)
        else:
            weights = tl.exp2(_dot(queries, tl.trans(keys), None, PRECISION) * log2_scale - lse2[:, None])
            if not EVEN:
                weights = tl.where((key < tokens)[None, :], weights, 0.0)
            if HALVES:
                values = _tile(v, key, low, v_token, v_channel, tokens, D, EVEN, D == BLOCK_D)
                product = _dot(low_upstream, tl.trans(values), None, PRECISION)
                values = _tile(v, key, low + BLOCK_D // 2, v_token, v_channel, tokens, D, EVEN, D == BLOCK_D)
                product = _dot(high_upstream, tl.trans(values), product, PRECISION)
            else:
                values = _tile(v, key, channel, v_token, v_channel, tokens, D, EVEN, D == BLOCK_D)
                product = _dot(upstream, tl.trans(values), None, PRECISION)
            slope = weights * (product - mean[:, None])
        gradient = _dot(slope.to(keys.dtype), keys, gradient, PRECISION)
    _put(dq + b * dq_batch + h * dq_head, gradient * scale, query, channel, dq_token, dq_channel, tokens, D)


@triton.jit
def backward_key(
    dout, q, k, v, logsumexp, delta, dk, dv, blocks, heads, tokens, scale, log2_scale,
    q_batch, q_head, q_token, q_channel, k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel, dout_batch, dout_head, dout_token, dout_channel,
    dk_batch, dk_head, dk_token, dk_channel, dv_batch, dv_head, dv_token, dv_channel,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERLEAVED: tl.constexpr,
    TO_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dk = Σ dsᵀ q/√d and dv = Σ pᵀ dout over the queries."""
    block, b, h, row = _head(blocks, heads)
    if INTERLEAVED:  # known to the compiler, an address for each channel takes no register
        q_channel = 3
        k_channel = 3
        v_channel = 3
    if TO_INTERLEAVED:
        dk_channel = 3
        dv_channel = 3
    q += b * q_batch + h * q_head
    dout += b * dout_batch + h * dout_head
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_D)
    row *= tokens
    keys = _tile(k + b * k_batch + h * k_head, key, channel, k_token, k_channel, tokens, D, EVEN, D == BLOCK_D)
    values = _tile(v + b * v_batch + h * v_head, key, channel, v_token, v_channel, tokens, D, EVEN, D == BLOCK_D)
    key_gradient = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in tl.range(0, tokens, BLOCK_Q, num_stages=STAGES):
        query = start + tl.arange(0, BLOCK_Q)
        queries = _tile(q, query, channel, q_token, q_channel, tokens, D, EVEN, D == BLOCK_D)
        upstream = _tile(dout, query, channel, dout_token, dout_channel, tokens, D, EVEN, D == BLOCK_D)
        # a query that does not exist: an infinite logsumexp makes its weights 0
        lse2 = tl.load(logsumexp + row + query, query < tokens, other=float("inf"))
        mean = tl.load(delta + row + query, query < tokens, other=0.0)
        weights = tl.exp2(_dot(keys, tl.trans(queries), None, PRECISION) * log2_scale - lse2[None, :])
        value_gradient = _dot(weights.to(upstream.dtype), upstream, value_gradient, PRECISION)
        slope = weights * (_dot(values, tl.trans(upstream), None, PRECISION) - mean[None, :])
        key_gradient = _dot(slope.to(queries.dtype), queries, key_gradient, PRECISION)
    _put(dk + b * dk_batch + h * dk_head, key_gradient * scale, key, channel, dk_token, dk_channel, tokens, D)
    _put(dv + b * dv_batch + h * dv_head, value_gradient, key, channel, dv_token, dv_channel, tokens, D)

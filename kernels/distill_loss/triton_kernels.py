"""The distillation losses on a GPU. A sample is one run of `size` elements, whatever its memory format.

STUDENT: 0 no student loss, 1 SiD's, 2 distribution matching. FAKE: whether the fake score's loss is computed.
factors (2, B): 1/omega (or the given weight), and 1 or 0 for a sample without or with a NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _read(images, y_real, y_fake, at, mask, STUDENT: tl.constexpr):
    x = tl.load(images + at, mask, other=0.0).to(tl.float32)
    fake = tl.load(y_fake + at, mask, other=0.0).to(tl.float32)
    if STUDENT != 0:
        real = tl.load(y_real + at, mask, other=0.0).to(tl.float32)
    else:
        real = x
    return x, real, fake


@triton.jit
def _terms(x, real, fake, alpha, STUDENT: tl.constexpr):
    """Per element: |x − y_r|, the student's term without 1/omega, the squared error, whether something is NaN."""
    gap = real - fake
    residual = real - x
    if STUDENT == 1:
        student = gap * (residual - alpha * gap)
    else:
        student = gap * gap
    error = fake - x
    bad = ((x != x) | (real != real)) | (fake != fake)
    return tl.abs(residual), student, error * error, bad


@triton.jit
def _losses(
    absolute, student, error, bad, b, size, student_weight, fake_weight, batch, student_loss, fake_loss, factors,
    STUDENT: tl.constexpr, FAKE: tl.constexpr,
):  # fmt: skip
    """Finishes one sample from its sums and writes it; returns 1/omega and whether to keep the sample."""
    keep = bad == 0.0
    factor = 0.0
    if STUDENT != 0:
        if student_weight is None:
            factor = 1.0 / tl.maximum(absolute / size, 1e-5)
        else:
            factor = tl.load(student_weight + b).to(tl.float32)
        if STUDENT == 1:
            loss = student * factor
        else:
            loss = 0.5 * student * factor * factor
        tl.store(student_loss + b, tl.where(keep, loss, 0.0))
    else:
        tl.store(student_loss + b, 0.0)
    if FAKE:
        tl.store(fake_loss + b, tl.where(keep, error * tl.load(fake_weight + b).to(tl.float32), 0.0))
    else:
        tl.store(fake_loss + b, 0.0)
    tl.store(factors + b, tl.where(keep, factor, 0.0))
    tl.store(factors + batch + b, keep.to(tl.float32))
    return factor, keep


@triton.jit
def sums(
    images, y_real, y_fake, workspace, student_weight, fake_weight, student_loss, fake_loss, factors,
    batch, size, span, spans, alpha,
    BLOCK: tl.constexpr, STUDENT: tl.constexpr, FAKE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One read: the sums of one span of a sample -> workspace (B, spans, 4); with WHOLE straight to the losses."""
    b = tl.program_id(0) // spans
    part = tl.program_id(0) % spans
    base = b.to(tl.int64) * size
    first = part * span
    last = tl.minimum(first + span, size)
    absolute = tl.zeros([BLOCK], tl.float32)
    student = tl.zeros([BLOCK], tl.float32)
    error = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for start in range(0, span, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        x, real, fake = _read(images, y_real, y_fake, base + at, at < last, STUDENT)
        a, s, e, nan = _terms(x, real, fake, alpha, STUDENT)
        absolute += a
        student += s
        error += e
        bad = tl.maximum(bad, nan.to(tl.float32))
    absolute = tl.sum(absolute, 0)
    student = tl.sum(student, 0)
    error = tl.sum(error, 0)
    bad = tl.max(bad, 0)
    if WHOLE:
        _losses(
            absolute, student, error, bad, b, size, student_weight, fake_weight, batch,
            student_loss, fake_loss, factors, STUDENT, FAKE,
        )  # fmt: skip
    else:
        at = workspace + tl.program_id(0) * 4
        tl.store(at, absolute)
        tl.store(at + 1, student)
        tl.store(at + 2, error)
        tl.store(at + 3, bad)


@triton.jit
def finish(
    workspace, student_weight, fake_weight, student_loss, fake_loss, factors, batch, size, spans,
    BLOCK_S: tl.constexpr, STUDENT: tl.constexpr, FAKE: tl.constexpr,
):  # fmt: skip
    """Adds a sample's spans up, in their order."""
    b = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    at = workspace + (b * spans + s) * 4
    mask = s < spans
    absolute = tl.sum(tl.load(at, mask, other=0.0), 0)
    student = tl.sum(tl.load(at + 1, mask, other=0.0), 0)
    error = tl.sum(tl.load(at + 2, mask, other=0.0), 0)
    bad = tl.max(tl.load(at + 3, mask, other=0.0), 0)
    _losses(
        absolute, student, error, bad, b, size, student_weight, fake_weight, batch,
        student_loss, fake_loss, factors, STUDENT, FAKE,
    )  # fmt: skip


@triton.jit
def _write(
    x, real, fake, student_scale, fake_scale, keep, alpha, at, mask, d_images, d_real, d_fake, d_fake_error,
    STUDENT: tl.constexpr, FAKE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The gradients that are wanted, 0 for a dropped sample. APART: y_fake's two gradients in two tensors."""
    gap = real - fake
    residual = real - x
    error = 2.0 * (fake - x) * fake_scale
    if d_images is not None:
        if STUDENT == 0:
            gradient = -error
        else:
            gradient = -gap * student_scale
        tl.store(d_images + at, tl.where(keep, gradient, 0.0), mask)
    if d_real is not None:
        if STUDENT == 1:
            gradient = (residual + (1.0 - 2.0 * alpha) * gap) * student_scale
        else:
            gradient = tl.zeros_like(gap)
        tl.store(d_real + at, tl.where(keep, gradient, 0.0), mask)
    slope = (2.0 * alpha * gap - residual) * student_scale
    if d_fake is not None:
        if STUDENT == 1 and FAKE and not APART:
            total = slope + error
        elif STUDENT == 1:
            total = slope
        elif APART or not FAKE:
            total = tl.zeros_like(gap)
        else:
            total = error
        tl.store(d_fake + at, tl.where(keep, total, 0.0), mask)
    if d_fake_error is not None:
        tl.store(d_fake_error + at, tl.where(keep, error, 0.0), mask)


@triton.jit
def gradients(
    images, y_real, y_fake, factors, student_gradient, fake_gradient, fake_weight, student_scale, fake_scale,
    d_images, d_real, d_fake, d_fake_error, batch, size, blocks, alpha,
    BLOCK: tl.constexpr, STUDENT: tl.constexpr, FAKE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One read, one write of what is wanted; the losses' gradients are (B,) tensors, or the scales alone."""
    b = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = b.to(tl.int64) * size + first
    mask = first < size
    x, real, fake = _read(images, y_real, y_fake, at, mask, STUDENT)
    keep = tl.load(factors + batch + b) != 0.0
    student = student_scale * tl.load(factors + b)
    if student_gradient is not None:
        student *= tl.load(student_gradient + b)
    error = fake_scale
    if FAKE:
        error *= tl.load(fake_weight + b).to(tl.float32)
    if fake_gradient is not None:
        error *= tl.load(fake_gradient + b)
    _write(
        x, real, fake, student, error, keep, alpha, at, mask, d_images, d_real, d_fake, d_fake_error,
        STUDENT, FAKE, APART,
    )  # fmt: skip


@triton.jit
def losses_and_gradients(
    images, y_real, y_fake, student_weight, fake_weight, student_scale, fake_scale, student_loss, fake_loss, factors,
    d_images, d_real, d_fake, d_fake_error, batch, size, alpha,
    BLOCK: tl.constexpr, STUDENT: tl.constexpr, FAKE: tl.constexpr,
):  # fmt: skip
    """A whole sample on chip: one read of the inputs gives both losses and every gradient."""
    b = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    at = b.to(tl.int64) * size + element
    mask = element < size
    x, real, fake = _read(images, y_real, y_fake, at, mask, STUDENT)
    a, s, e, nan = _terms(x, real, fake, alpha, STUDENT)
    factor, keep = _losses(
        tl.sum(a, 0), tl.sum(s, 0), tl.sum(e, 0), tl.max(nan.to(tl.float32), 0), b, size, student_weight, fake_weight,
        batch, student_loss, fake_loss, factors, STUDENT, FAKE,
    )  # fmt: skip
    error = fake_scale
    if FAKE:
        error *= tl.load(fake_weight + b).to(tl.float32)
    _write(
        x, real, fake, student_scale * factor, error, keep, alpha, at, mask, d_images, d_real, d_fake, d_fake_error,
        STUDENT, FAKE, True,
    )  # fmt: skip

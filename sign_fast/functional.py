"""Every operation of the library as one documented, differentiable function.

Shapes: B batch, C channels, H×W pixels, T tokens. Activations may be float32, bfloat16, float16 (float64 for checks)
in any memory format; channels_last stays channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .kernels.attention import op as _attention
from .kernels.combine import op as _combine
from .kernels.convolution import op as _convolution
from .kernels.distill_loss import op as _distill_loss
from .kernels.group_norm_silu import op as _group_norm_silu
from .kernels.sampler_step import op as _sampler_step
from .kernels.sampler_step.reference import renoise as _renoise

Activation = Literal["silu"] | None
Resampling = Literal["none", "up", "down"]


def _check(condition: bool, message: str) -> None:
    # a plain if: torch.compile folds it away, an assert would vanish under -O
    if not condition:
        raise ValueError(message)


def _is_silu(activation: str | None) -> bool:
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, not {activation!r}")
    return activation == "silu"


def _together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that torch.cat or + would give, which under autocast may be that of one of them."""
    if a.device != b.device:
        raise ValueError(f"tensors must be on one device, not on {a.device} and {b.device}")
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _check_floating(t: Tensor) -> None:
    if not t.is_floating_point():
        raise ValueError(f"a floating dtype is needed, not {t.dtype}")


def _check_groups(
    x: Tensor,
    channels: int,
    num_groups: int,
    vectors: tuple[Tensor | None, ...],
    rows: tuple[Tensor | None, ...] = (),
) -> None:
    """x (B, ·, H, W); vectors (channels,) each; rows (B, channels) or (1, channels) each, on x's device."""
    batch, device = x.shape[0], x.device
    _check_floating(x)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
    for t in vectors:
        if t is not None and t.shape != (channels,):
            raise ValueError(f"weight and biases must be ({channels},), not {tuple(t.shape)}")
    for t in rows:
        if t is not None and t.shape != (batch, channels) and t.shape != (1, channels):
            raise ValueError(
                f"emb, scale and shift must be ({batch}, {channels}) or (1, {channels}), not {tuple(t.shape)}"
            )
    for t in (*vectors, *rows):
        if t is not None and t.device != device:
            raise ValueError(f"tensors must be on one device, not on {device} and {t.device}")


def group_norm_silu(
    x: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    emb: Tensor | None = None,
    input_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """silu(norm(x + emb + input_bias)·(1 + scale) + shift): GroupNorm (Wu & He 2018) and its surroundings.

    Args:
        x: (B, C, H, W), or a pair (B, C1, H, W), (B, C2, H, W) that is read as its concatenation over the channels,
            C = C1 + C2, without making one; of two dtypes the wider, as torch.cat.
        num_groups: divides C; statistics are taken in float32 over C/num_groups channels and all pixels.
        weight, bias: (C,) affine of the norm, or None.
        eps: added to the variance.
        emb, scale, shift: (B, C) or (1, C) each, or None.
        input_bias: (C,), such as the bias of the convolution that made x, or None.
        activation: "silu", or None for a plain norm.

    Returns:
        (B, C, H, W) in x's dtype and memory format (of a pair: the first one's).

    Raises:
        ValueError: a shape does not fit, tensors are on different devices, or the activation is unknown.
    """
    silu = _is_silu(activation)
    first, second = (x, None) if isinstance(x, Tensor) else x
    if first.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), not {tuple(first.shape)}")
    channels = first.shape[1]
    if second is not None:
        if second.ndim != 4 or second.shape[::2] != first.shape[::2] or second.shape[3] != first.shape[3]:
            raise ValueError(f"a pair must agree but for C, not {tuple(first.shape)} and {tuple(second.shape)}")
        channels += second.shape[1]
        first, second = _together(first, second)
    _check_groups(first, channels, num_groups, (weight, bias, input_bias), (emb, scale, shift))
    return _group_norm_silu.group_norm_silu(
        first, second, num_groups, weight, bias, eps, emb, input_bias, scale, shift, silu
    )


def residual_group_norm_silu(
    h: Tensor,
    skip: Tensor,
    bias: Tensor | None,
    skip_scale: float,
    num_groups: int,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    *,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    """r = (h + bias + skip)·skip_scale and y = silu(norm(r)): the residual join and the norm that follows it.

    Args:
        h, skip: (B, C, H, W), equal shapes; of two dtypes the wider, as h + skip.
        bias: (C,) added to h (a convolution's bias), or None.
        skip_scale: a number, √½ or 1 in the published networks.
        num_groups, weight, norm_bias, eps, activation: as in `group_norm_silu`.

    Returns:
        (r, y), both (B, C, H, W) in the dtype of h + skip and h's memory format.

    Raises:
        ValueError: a shape does not fit, tensors are on different devices, or the activation is unknown.
    """
    silu = _is_silu(activation)
    if h.shape != skip.shape:
        raise ValueError(f"h {tuple(h.shape)} and skip {tuple(skip.shape)} must have one shape")
    if h.ndim != 4:
        raise ValueError(f"h must be (B, C, H, W), not {tuple(h.shape)}")
    h, skip = _together(h, skip)
    _check_groups(h, h.shape[1], num_groups, (bias, weight, norm_bias))
    return _group_norm_silu.residual_group_norm_silu(
        h, skip, bias, skip_scale, num_groups, weight, norm_bias, eps, silu
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v with the softmax in float32 (Vaswani et al. 2017, eq. 1).

    Args:
        q, k, v: (B·heads, T, d) or (B, heads, T, d), one shape and dtype, any strides.

    Returns:
        q's shape, in its dtype.

    Raises:
        ValueError: the shapes or dtypes differ, or are not three- or four-dimensional.
    """
    if q.ndim not in (3, 4) or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k, v must have one shape (B·heads, T, d) or (B, heads, T, d), not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    _check_devices(q, k=k, v=v)
    _check_floating(q)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.ndim == 3:
        return _attention.attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return _attention.attention(q, k, v)


def projected_attention(qkv: Tensor, num_heads: int, *, interleaved: bool = True) -> Tensor:
    """Self-attention of every pixel with all others, straight from the projection that makes q, k and v.

    Args:
        qkv: (B, 3·heads·d, H, W). Interleaved, as in the published networks, row ((head·d) + c)·3 + {0: q, 1: k, 2: v};
            else the rows of q, then of k, then of v, each (head·d) + c.
        num_heads: heads; d is at most 256 for the fast path.
        interleaved: which of the two.

    Returns:
        (B, heads·d, H, W) in qkv's dtype and memory format.

    Raises:
        ValueError: qkv is not four-dimensional or its channels are not three times a multiple of num_heads.
    """
    if qkv.ndim != 4 or num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(f"qkv must be (B, 3·{num_heads}·d, H, W), not {tuple(qkv.shape)}")
    _check_floating(qkv)
    return _attention.projected_attention(qkv, num_heads, interleaved)


def denoising_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """w(σ) = (σ² + s²)/(σ s)² = 1/σ² + 1/s² of a denoiser's loss (EDM, Table 1).

    Args:
        sigma: B noise levels in any shape.
        sigma_data: s, the data's standard deviation.

    Returns:
        (B,), at least float32.

    Raises:
        ValueError: sigma_data is not positive.
    """
    if sigma_data <= 0:
        raise ValueError(f"sigma_data must be positive, not {sigma_data}")
    wide = sigma if sigma.dtype == torch.float64 else sigma.float()  # 1/σ² of small levels is beyond float16
    return wide.reshape(-1) ** -2 + sigma_data**-2


def _fake_weight(sigma: Tensor, sigma_data: float, batch: int) -> Tensor:
    """`denoising_weight` of `batch` levels."""
    if sigma.numel() != batch:
        raise ValueError(f"sigma must hold {batch} values, not {sigma.numel()}")
    return denoising_weight(sigma, sigma_data)


def _checked_predictions(images: Tensor, y_real: Tensor, y_fake: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weight as (B,), whatever shape its B values came in."""
    if not images.shape == y_real.shape == y_fake.shape:
        raise ValueError(
            f"images {tuple(images.shape)}, y_real {tuple(y_real.shape)} and y_fake {tuple(y_fake.shape)} must agree"
        )
    if weight is not None and weight.numel() != images.shape[0]:
        raise ValueError(f"weight must hold {images.shape[0]} values, not {weight.numel()}")
    _check_devices(images, y_real=y_real, y_fake=y_fake, weight=weight)
    _check_floating(images)
    return None if weight is None else weight.reshape(-1)


def _check_devices(first: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != first.device:
            raise ValueError(f"{name} is on {t.device}, the rest on {first.device}: move it there")


def fake_score_loss(
    y_fake: Tensor,
    images: Tensor,
    sigma: Tensor | None = None,
    sigma_data: float = 0.5,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """w(σ)·‖y_fake − x‖² with w = (σ² + s²)/(σ s)²: denoising score matching of the fake score (SiD, Algorithm 1).

    Args:
        y_fake: (B, …) the fake score's prediction of the clean image.
        images: (B, …) the clean images.
        sigma: (B,) or (B, 1, 1, 1) noise levels; not needed with weight.
        sigma_data: s, the data's standard deviation.
        weight: (B,) takes the place of w(σ), such as ones where the network predicts noise and images are the noise.

    Returns:
        (B,) float32 per-sample sums; a sample with a NaN in y_fake or images is 0 and sends back zero gradient.

    Raises:
        ValueError: y_fake and images differ in shape, neither sigma nor weight is given, or it does not hold B values.
    """
    _check(y_fake.shape == images.shape, f"y_fake {tuple(y_fake.shape)} and images {tuple(images.shape)} must agree")
    _check_devices(images, y_fake=y_fake, sigma=sigma, weight=weight)
    _check_floating(images)
    if weight is None:
        if sigma is None:
            raise ValueError("sigma or weight is needed")
        weight = _fake_weight(sigma, sigma_data, images.shape[0])
    _check(weight.numel() == images.shape[0], f"weight must hold {images.shape[0]} values, not {weight.numel()}")
    return _distill_loss.fake_score_loss(y_fake, images, weight.reshape(-1))


def sid_generator_loss(
    images: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float = 1.2, *, weight: Tensor | None = None
) -> Tensor:
    """(y_r − y_f)·((y_r − x) − α(y_r − y_f))/ω with ω = mean|x − y_r| ≥ 1e-5 without gradient (SiD, eq. 23).

    Args:
        images: (B, …) the student's images x.
        y_real, y_fake: (B, …) the teacher's and the fake score's predictions from the noised images.
        alpha: 1.2 published, 1.0 for AFHQ.
        weight: (B,) takes the place of 1/ω, such as the flow weights 1 − t, (1 − t)/t and ((1 − t)/t)².

    Returns:
        (B,) float32 per-sample sums; a sample with a NaN in any input is 0 and sends back zero gradient.

    Raises:
        ValueError: the three shapes differ, or weight does not hold B values.
    """
    weight = _checked_predictions(images, y_real, y_fake, weight)
    return _distill_loss.sid_generator_loss(images, y_real, y_fake, alpha, weight)


def distribution_matching_loss(
    images: Tensor, y_real: Tensor, y_fake: Tensor, *, weight: Tensor | None = None
) -> Tensor:
    """½‖g − stop(g − direction)‖² with direction = (y_f − y_r)/mean|g − y_r|: distribution matching (DMD, eq. 7).

    Its gradient for the images is the direction; the predictions are data.

    Args:
        images: (B, …) the student's images g.
        y_real, y_fake: (B, …) the teacher's and the fake score's predictions of the clean image.
        weight: (B,) takes the place of 1/mean|g − y_r|.

    Returns:
        (B,) float32; a sample with a NaN in any input is 0 and sends back zero gradient.

    Raises:
        ValueError: the three shapes differ, or weight does not hold B values.
    """
    weight = _checked_predictions(images, y_real, y_fake, weight)
    return _distill_loss.distribution_matching_loss(images, y_real, y_fake, weight)


def distill_losses(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    sigma: Tensor,
    alpha: float = 1.2,
    sigma_data: float = 0.5,
    *,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sid_generator_loss` and `fake_score_loss` of the same predictions, in one pass over the data.

    The fake loss takes the images as data: it sends gradient to y_fake only.

    Args:
        images, y_real, y_fake, sigma, alpha, sigma_data, weight: as in the two functions.

    Returns:
        (student (B,), fake (B,)), float32; a NaN in any input drops the sample from both.

    Raises:
        ValueError: shapes differ, or sigma or weight does not hold B values.
    """
    weight = _checked_predictions(images, y_real, y_fake, weight)
    _check_devices(images, sigma=sigma)
    fake_weight = _fake_weight(sigma, sigma_data, images.shape[0])
    return _distill_loss.distill_losses(images, y_real, y_fake, alpha, weight, fake_weight)


def distill_loss_gradients(
    images: Tensor,
    y_real: Tensor,
    y_fake: Tensor,
    sigma: Tensor,
    alpha: float = 1.2,
    sigma_data: float = 0.5,
    *,
    weight: Tensor | None = None,
    fake_weight: Tensor | None = None,
    student_scale: float = 1.0,
    fake_scale: float = 1.0,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, ...]:
    """Both losses and all gradients of student_scale·Σ student + fake_scale·Σ fake, at once and without autograd.

    What a training step that uses both losses needs: the gradients are the seeds of its backward passes.

    Args:
        images, y_real, y_fake, sigma, alpha, sigma_data, weight: as in `distill_losses`.
        fake_weight: (B,) multiplies the fake loss's w(σ), such as a ratio of densities.
        student_scale, fake_scale: factors of the two sums.
        wanted: whether the student loss's gradients for images, y_real and y_fake are wanted; else they are empty.

    Returns:
        (student (B,), fake (B,), d_images, d_y_real, d_y_fake of the student loss, d_y_fake of the fake loss).

    Raises:
        ValueError: shapes differ, or sigma or a weight does not hold B values.
    """
    weight = _checked_predictions(images, y_real, y_fake, weight)
    _check_devices(images, sigma=sigma, fake_weight=fake_weight)
    level_weight = _fake_weight(sigma, sigma_data, images.shape[0])
    if fake_weight is not None:
        _check(fake_weight.numel() == images.shape[0], f"fake_weight must hold {images.shape[0]} values")
        level_weight = level_weight * fake_weight.reshape(-1)
    return _distill_loss.distill_loss_gradients(
        images, y_real, y_fake, alpha, weight, level_weight, student_scale, fake_scale, wanted
    )


def _check_network_output(x: Tensor, f: Tensor) -> None:
    _check(f.shape == x.shape, f"x {tuple(x.shape)} and F {tuple(f.shape)} must agree")
    _check(f.device == x.device, f"x is on {x.device}, F on {f.device}")


def _check_images(x: Tensor, network_output: Tensor | None, c_skip: Tensor | None, c_out: Tensor | None) -> None:
    _check(x.ndim == 4, f"images must be (B, C, H, W), not {tuple(x.shape)}")
    _check(x.is_floating_point(), f"images must be of a floating dtype, not {x.dtype}")
    given = [t is not None for t in (network_output, c_skip, c_out)]
    _check(all(given) or not any(given), "network_output, c_skip and c_out come together")
    if network_output is not None:
        _check_network_output(x, network_output)
    _check_coefficients(x, c_skip, c_out)


def _check_coefficients(x: Tensor, *coefficients: Tensor | float | None) -> None:
    for t in coefficients:
        if isinstance(t, Tensor):
            _check(t.numel() in (1, x.shape[0]), f"coefficients must be 1 or {x.shape[0]} values")
            _check(t.device == x.device, f"coefficients on {t.device}, images on {x.device}")


def _check_seeds(seeds: Tensor) -> None:
    _check(seeds.dtype == torch.int64 and seeds.ndim == 1, "seeds must be (B,) int64")


def philox_normal(
    seeds: Tensor,
    step: int,
    shape: tuple[int, int, int],
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """scale·n with n ~ N(0, 1) from Philox 4x32-10 (Salmon et al. 2011): the noise of each image is its seed's own.

    The key is the image's seed, the counter (element // 4, step, 0, 0) with elements in C, H, W order; four words make
    four normals by Box and Muller's transform in float32. An image does not depend on its batch, on the memory format
    or on the device; `sampler_step` adds the same n.

    Args:
        seeds: (B,) int64, all 64 bits count.
        step: which of a seed's streams, modulo 2³².
        shape: (C, H, W) of an image.
        scale: multiplies n in float32.
        dtype: of the result; float64 evaluates the transform in float64, for checks.
        device: where the result is made; None takes the seeds' device.
        memory_format: torch.contiguous_format or torch.channels_last.

    Returns:
        (B, C, H, W) in dtype and memory_format.

    Raises:
        ValueError: seeds, shape, dtype or memory_format are not as above.
    """
    _check_seeds(seeds)
    _check(len(shape) == 3 and min(shape) >= 0, f"shape must be (C, H, W), not {tuple(shape)}")
    _check(dtype.is_floating_point, f"dtype must be a floating dtype, not {dtype}")
    _check(memory_format in (torch.contiguous_format, torch.channels_last), f"{memory_format} is not supported")
    seeds = seeds if device is None else seeds.to(device)
    return _sampler_step.philox_normal(seeds, step, tuple(shape), scale, dtype, memory_format == torch.channels_last)


def sampler_step(
    x: Tensor,
    network_output: Tensor | None = None,
    c_skip: Tensor | None = None,
    c_out: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    step: int = 0,
    scale: Tensor | float = 1.0,
    sigma: Tensor | float = 1.0,
) -> Tensor:
    """scale·D + σ·n with D = c_skip·x + c_out·F (EDM, eq. 7) and n of `philox_normal`, in one pass.

    Args:
        x: (B, C, H, W).
        network_output: F (B, C, H, W), of any floating dtype; without it D = x.
        c_skip, c_out: 1 or B values, with network_output.
        seeds: (B,) int64, one for each image; without them the result is D.
        step: which of the seeds' streams.
        scale, sigma: numbers, or tensors of 1 or B values on x's device.

    Returns:
        (B, C, H, W) in x's dtype and memory format, computed in float32. Differentiable in plain torch.

    Raises:
        ValueError: a shape, dtype or device does not fit, or some of network_output, c_skip and c_out are missing.
    """
    _check_images(x, network_output, c_skip, c_out)
    if seeds is not None:
        _check_seeds(seeds)
        _check(seeds.shape[0] == x.shape[0], f"{seeds.shape[0]} seeds for {x.shape[0]} images")
        _check(seeds.device == x.device, f"seeds on {seeds.device}, images on {x.device}")
        _check_coefficients(x, scale, sigma)
    return _sampler_step.sampler_step(x, network_output, c_skip, c_out, seeds, step, scale, sigma)


def to_uint8(
    images: Tensor,
    network_output: Tensor | None = None,
    c_skip: Tensor | None = None,
    c_out: Tensor | None = None,
) -> Tensor:
    """clip(D·127.5 + 128, 0, 255), truncated: images D in [-1, 1] to bytes.

    Args:
        images: (B, C, H, W), any floating dtype: D itself, or x where the rest is given.
        network_output, c_skip, c_out: as in `sampler_step`, for D = c_skip·x + c_out·F in the same pass.

    Returns:
        (B, H, W, C) uint8, contiguous; NaN becomes 0.

    Raises:
        ValueError: images is not four-dimensional or not floating, or the rest does not fit it.
    """
    _check_images(images, network_output, c_skip, c_out)
    return _sampler_step.finish_images(images, network_output, c_skip, c_out)


def precondition(x: Tensor, network_output: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """D = c_skip·x + c_out·F (EDM, eq. 7), in x's dtype, computed in float32.

    Args:
        x, network_output: (B, C, H, W).
        c_skip, c_out: broadcastable to x; with one value for each image, and no gradient wanted, one kernel does it.

    Returns:
        (B, C, H, W) in x's dtype.

    Raises:
        ValueError: F's shape or device is not x's, or a coefficient does not broadcast to it.
    """
    _check_network_output(x, network_output)
    for t in (c_skip, c_out):
        fits = t.ndim <= x.ndim and all(a in (1, b) for a, b in zip(t.shape[::-1], x.shape[::-1], strict=False))
        _check(fits, f"a coefficient of shape {tuple(t.shape)} does not broadcast to x {tuple(x.shape)}")
    return _sampler_step.precondition(x, network_output, c_skip, c_out)


def renoise(denoised: Tensor, noise: Tensor, scale: Tensor | float, sigma: Tensor | float) -> Tensor:
    """x = scale·D + σ·n, the state from which a few-step sampler makes its next call, with noise that is at hand.

    `sampler_step` draws the noise itself and preconditions in the same pass.

    Args:
        denoised, noise: (B, C, H, W).
        scale, sigma: numbers or tensors broadcastable to denoised.

    Returns:
        (B, C, H, W).
    """
    return _renoise(denoised, noise, scale, sigma)


def _check_states(states: Sequence[Tensor]) -> None:
    most = _combine.MOST_STATES
    if not 1 <= len(states) <= most:
        raise ValueError(f"1 to {most} states are needed, not {len(states)}: sum more of them in turns")
    shape, device = states[0].shape, states[0].device
    if len(shape) != 4:
        raise ValueError(f"states must be (B, C, H, W), not {tuple(shape)}")
    for t in states:
        _check_floating(t)
        if t.shape != shape:
            raise ValueError(f"states {tuple(shape)} and {tuple(t.shape)} must agree")
        if t.device != device:
            raise ValueError(f"states must be on one device, not on {device} and {t.device}")


def combine(
    states: Sequence[Tensor], coefficients: Sequence[float] | Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Σ c[j]·states[j] in one pass, added from the left: all that a sampler does between two network calls.

    EDM's Algorithm 1 is two of them a step: x_hat + (t_next − t_hat)·(x_hat − D)/t_hat is a sum of x_hat and D.

    Args:
        states: 1 to 8 tensors (B, C, H, W) of any floating dtypes and memory formats.
        coefficients: a number for each state; or a (n,) float64 tensor on the states' device, which the kernel reads,
            so that a CUDA graph can take it as an input. Numbers are copied to the device, for which a GPU waits.
        dtype: of the result; None takes the first state's. The sum is float64 where dtype is, else float32.

    Returns:
        (B, C, H, W) in dtype and the first state's memory format. Differentiable in plain torch.

    Raises:
        ValueError: the number of states or coefficients, a shape, a dtype or a device does not fit.
    """
    _check_states(states)
    first, count = states[0], len(states)
    dtype = first.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"the result must have a floating dtype, not {dtype}")
    if not isinstance(coefficients, Tensor):
        coefficients = torch.tensor(coefficients, dtype=torch.float64, device=first.device)
    if coefficients.shape != (count,) or coefficients.dtype != torch.float64:
        given = f"{tuple(coefficients.shape)} {coefficients.dtype}"
        raise ValueError(f"coefficients must be ({count},) torch.float64, not {given}")
    if coefficients.device != first.device:
        raise ValueError(f"coefficients on {coefficients.device}, states on {first.device}")
    return _combine.combine(states, coefficients, dtype)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, resampling: Resampling = "none") -> Tensor:
    """The convolution of the resampled x with `weight`, with zeros around it so that H×W stay, plus the bias.

    float32 images on the CPU take C++ kernels (Winograd's, Lavin & Gray 2016) forward and backward; all else is
    torch's: cuDNN on a GPU, and gradients of gradients.

    Args:
        x: (B, C, H, W).
        weight: (C', C, k, k), k odd, of x's dtype.
        bias: (C',), or None.
        resampling: of x, before the convolution: "up" nearest ×2, "down" the mean of 2×2.

    Returns:
        (B, C', H', W'); by C++ always channels_last, which what follows keeps, since that is twice as fast even for
        a network in NCHW. No bit of it or of its gradients depends on the number of threads where C++ computes them;
        frozen tensors' are never computed.

    Raises:
        ValueError: the resampling is unknown.
        RuntimeError: the weight or bias does not fit x.
    """
    _check(resampling in ("none", "up", "down"), f"resampling must be 'none', 'up' or 'down', not {resampling!r}")
    return _convolution.convolution(x, weight, bias, resampling)


__all__ = [
    "attention",
    "combine",
    "convolution",
    "denoising_weight",
    "distill_loss_gradients",
    "distill_losses",
    "distribution_matching_loss",
    "fake_score_loss",
    "group_norm_silu",
    "philox_normal",
    "precondition",
    "projected_attention",
    "renoise",
    "residual_group_norm_silu",
    "sampler_step",
    "sid_generator_loss",
    "to_uint8",
]

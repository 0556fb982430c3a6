"""Distillation of latent models, noise-predicting and rectified-flow, with guidance and few steps (SPEC, section 6).

A network is any callable predict(x, t, text) -> (B, C, H, W): x (B, C, H, W) latents, t (B,) of the prediction's
dtype, text the prompts' embeddings: `TextConditioning` of B rows, or a tensor (B, …). Losses are per sample, summed
over channels and pixels, and go through ls/B and lsg/B: 1 and 1 where noise or v is predicted, 1 and 100 of a flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import functional
from ..sampling.text import TextConditioning
from .discriminator import LOGIT_LIMIT, cross_entropy, valid_samples
from .latent_predictions import (
    FIRST_STEP,
    FLOW_WEIGHTS,
    LAST_STEP,
    EpsilonPrediction,
    FlowPrediction,
    Prediction,
    VelocityPrediction,
    flow_weight,
    prediction_of,
)

Text = Tensor | TextConditioning
Predict = Callable[[Tensor, Tensor, Any], Tensor]
PROMPT_DROPOUT = 0.1
"""Share of prompts replaced by the unconditional one where any κ differs from 1."""


@dataclass(frozen=True)
class Guidance:
    """The guidance scales of SiD-LSG.

    Args:
        fake_training: κ1, of the fake score's prediction in its own loss.
        fake: κ2 = κ3, of y_fake in the student's loss.
        teacher: κ4, of y_real in the student's loss.
    """

    fake_training: float = 1.0
    fake: float = 1.0
    teacher: float = 1.0

    @property
    def prompt_dropout(self) -> float:
        """Share of prompts to drop in training: none where every κ is 1."""
        return 0.0 if self == Guidance() else PROMPT_DROPOUT


STRATEGIES = {
    "none": Guidance(),
    "lsg": Guidance(2, 2, 2),
    "lsg-4.5": Guidance(1.5, 1.5, 4.5),
    "zero-cfg": Guidance(0, 0, 1),
}
"""Named strategies with fixed scales; "anti-cfg" takes its scale, see `guidance`."""


def guidance(strategy: str, scale: float | None = None) -> Guidance:
    """The scales of a named strategy.

    Args:
        strategy: "none", "lsg" (κ 2/2/2/2), "lsg-4.5" (1.5/1.5/1.5/4.5), "zero-cfg" (0/0/0/1) or "anti-cfg".
        scale: κ1 to κ3 of "anti-cfg", negative; its κ4 is 1.

    Raises:
        ValueError: an unknown strategy; a scale that is missing, not negative, or given where it is fixed.
    """
    if strategy == "anti-cfg":
        if scale is None or not -math.inf < scale < 0:
            raise ValueError(f"anti-cfg needs a negative scale, such as -0.5, not {scale}")
        return Guidance(scale, scale, 1)
    if strategy not in STRATEGIES:
        raise ValueError(f"guidance must be one of {', '.join([*STRATEGIES, 'anti-cfg'])}, not {strategy!r}")
    if scale is not None:
        raise ValueError(f"the scales of {strategy} are fixed: leave out {scale}")
    return STRATEGIES[strategy]


def guided(
    predict: Predict, x: Tensor, t: Tensor, embeddings: Text, unconditional: Text | None, scale: float
) -> Tensor:
    """u + scale·(c − u), classifier-free guidance from one call with 2B rows, the unconditional ones first.

    A scale of 1 is one conditional call with B rows, 0 one unconditional call.

    Args:
        predict, x, t, embeddings: see the module.
        unconditional: (1, …) or (B, …) embedding of no prompt; may be None where scale is 1.
        scale: g.

    Returns:
        (B, C, H, W) as the network predicts.

    Raises:
        ValueError: no unconditional embedding where one is needed.
    """
    if scale == 1:
        return predict(x, t, embeddings)
    if unconditional is None:
        raise ValueError(f"a guidance scale of {scale} needs the unconditional embedding")
    unconditional = rows_of(unconditional, len(x))
    if scale == 0:
        return predict(x, t, unconditional)
    both = predict(torch.cat([x, x]), torch.cat([t, t]), _cat(unconditional, embeddings))
    u, c = both.chunk(2)
    return u + scale * (c - u)


def rows_of(text: Text, rows: int) -> Any:
    """One prompt's embeddings, (1, …), as B rows; B rows as they are."""
    return text.expand(rows) if isinstance(text, TextConditioning) else text.expand(rows, *text.shape[1:])


def _cat(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) else TextConditioning.cat([first, second])


def drop_prompts(embeddings: Any, unconditional: Any, uniform: Tensor, probability: float) -> Any:
    """Embeddings (B, …) with the unconditional one, (1, …) or (B, …), where uniform (B,) < probability."""
    dropped = uniform < probability
    if isinstance(embeddings, TextConditioning):
        return embeddings.where(dropped, unconditional)
    return torch.where(dropped.reshape(-1, *[1] * (embeddings.ndim - 1)), unconditional, embeddings)


def roll_out(
    predict: Predict,
    latents: Tensor,
    noises: Sequence[Tensor],
    embeddings: Text,
    prediction: Prediction,
    call: int,
    num_steps: int,
    *,
    noise: Literal["fresh", "fixed", "ddim"] = "fresh",
) -> Tensor:
    """D_k of few-step generation with k = call: k − 1 calls without gradient, gradient through call k only.

    D_0 = 0; x = noised(D_{i−1}, n_i, t_i), D_i = denoised(x, predict(x, t_i)) (few-step SiD, Algorithm 1). k is drawn
    uniformly from 1 … K once an iteration, the same for all processes and for both losses: the uniform mixture over
    steps. One-step training is call 1 of 1.

    Args:
        predict, embeddings: see the module.
        latents: (B, C, H, W) standard normal, the first noise.
        noises: k − 1 or more tensors like latents, the noise of calls 2 …; ignored unless noise is "fresh".
        prediction: what the network predicts.
        call, num_steps: k and K.
        noise: of calls 2 …: "fresh", "fixed" (the latents again) or "ddim" (the noise that the last call implies).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: call is not in 1 … num_steps, too few noises, or an unknown kind of noise.
    """
    if not 1 <= call <= num_steps:
        raise ValueError(f"call must be one of 1 … {num_steps}, not {call}")
    if noise not in ("fresh", "fixed", "ddim"):
        raise ValueError(f"noise must be fresh, fixed or ddim, not {noise!r}")
    if noise == "fresh" and len(noises) < call - 1:
        raise ValueError(f"call {call} needs {call - 1} noises, not {len(noises)}")
    times = [
        torch.full([latents.shape[0]], t, dtype=prediction.time_dtype, device=latents.device)
        for t in prediction.grid(num_steps)[:call]
    ]
    with torch.no_grad():
        x = prediction.noised(torch.zeros_like(latents), latents, times[0])
        for i in range(call - 1):
            denoised = prediction.denoised(x, predict(x, times[i], embeddings), times[i])
            following = latents
            if noise == "fresh":
                following = noises[i]
            elif noise == "ddim":
                following = prediction.implied_noise(x, denoised, times[i])
            x = prediction.noised(denoised, following, times[i + 1])
    return prediction.denoised(x, predict(x, times[-1], embeddings), times[-1])


def fake_score_loss(
    fake: Predict,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
    embeddings: Text,
    unconditional: Text | None,
    prediction: Prediction,
    scales: Guidance,
) -> Tensor:
    """‖output_κ1 − target‖², the target being n for ε, √ᾱ·n − √(1−ᾱ)·x_g for v and n − x_g for flow: the fake score's.

    Args:
        fake, embeddings: see the module.
        images: (B, C, H, W) the student's latents x_g; no gradient goes into them.
        noise: (B, C, H, W) standard normal; t: (B,), of the prediction's `training_times`.
        unconditional, scales: as in `guided`, with κ1.
        prediction: what the network predicts.

    Returns:
        (B,) float32; a sample with a NaN in the images or the output is 0 and sends back zero gradient.
    """
    # a NaN that entered the network would reach its weights' gradients as 0·NaN
    valid, (images,) = valid_samples(images.detach())
    x = prediction.noised(images, noise, t)
    output = guided(fake, x, t, embeddings, unconditional, scales.fake_training)
    target = prediction.target(images, noise, t)
    return functional.fake_score_loss(output.to(target.dtype), target, weight=valid)


def student_loss(
    teacher: Predict,
    fake: Predict,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
    embeddings: Text,
    unconditional: Text | None,
    prediction: Prediction,
    scales: Guidance,
    alpha: float = 1.0,
    *,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.sid_generator_loss` of latents, y_real guided by κ4 and y_fake by κ2 = κ3.

    For α = 1 the published program writes (y_r − y_f)(y_f − x_g)/ω. That is the same, since
    (y_r − x_g) − (y_r − y_f) = y_f − x_g.

    Args:
        teacher, fake, embeddings: see the module; freeze their parameters, gradient flows through them into images.
        images: (B, C, H, W) the student's latents x_g.
        noise, t, unconditional, prediction: as in `fake_score_loss`, drawn afresh.
        scales: κ2 to κ4.
        alpha: α.
        weight: (B,) takes the place of 1/ω, such as a `flow_weight`.

    Returns:
        (losses (B,) float32, y_real, y_fake); a sample with a NaN in any of the three images is 0 and sends back zero
        gradient.
    """
    _, (finite,) = valid_samples(images)  # a NaN must not enter the networks; the loss drops its sample
    x = prediction.noised(finite, noise, t)
    y_real, y_fake = (
        prediction.denoised(x, guided(net, x, t, embeddings, unconditional, scale), t).to(images.dtype)
        for net, scale in ((teacher, scales.teacher), (fake, scales.fake))
    )
    return functional.sid_generator_loss(images, y_real, y_fake, alpha, weight=weight), y_real, y_fake


def diffusion_gan_discriminator_loss(logit_real: Tensor, logit_fake: Tensor) -> Tensor:
    """½(BCE(real → 1) + BCE(fake → 0)), each the mean over a sample's map; goes beside the fake score's loss.

    Args:
        logit_real, logit_fake: (B, …) `discriminator.pooled_logits` of the fake score's middle block, for noised real
            and student's latents at the same t and noise.

    Returns:
        (B,); a sample with a NaN in either is 0 and sends back zero gradient.

    Raises:
        ValueError: the shapes differ.
    """
    if logit_real.shape != logit_fake.shape:
        raise ValueError(f"logits of real {tuple(logit_real.shape)} and fake {tuple(logit_fake.shape)} must agree")
    valid, (logit_real, logit_fake) = valid_samples(logit_real, logit_fake)
    return 0.5 * valid * (cross_entropy(logit_real, True) + cross_entropy(logit_fake, False))


def diffusion_gan_student_loss(logits: Tensor) -> Tensor:
    """BCE(clamp(logit, ±10) → 1), the mean over a sample's map; the student's loss is ½ of it and ½ of `student_loss`.

    Args:
        logits: (B, …) of the noised student's latents, with gradient into them.

    Returns:
        (B,); a sample with a NaN is 0 and sends back zero gradient.
    """
    valid, (logits,) = valid_samples(logits)
    return valid * cross_entropy(logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT), True)


__all__ = [
    "FIRST_STEP",
    "FLOW_WEIGHTS",
    "LAST_STEP",
    "PROMPT_DROPOUT",
    "STRATEGIES",
    "EpsilonPrediction",
    "FlowPrediction",
    "Guidance",
    "Predict",
    "Prediction",
    "VelocityPrediction",
    "diffusion_gan_discriminator_loss",
    "diffusion_gan_student_loss",
    "drop_prompts",
    "fake_score_loss",
    "flow_weight",
    "guidance",
    "guided",
    "prediction_of",
    "roll_out",
    "rows_of",
    "student_loss",
]

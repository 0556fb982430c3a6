"""Distillation of latent models, noise-predicting and rectified-flow, with guidance and few steps (SPEC, section 6).

A network is any callable predict(x, t, embeddings) -> (B, C, H, W): x (B, C, H, W) latents, t (B,) of the prediction's
dtype, embeddings (B, …) of the prompts. Losses are per sample, summed over channels and pixels, and go through ls/B and
lsg/B: 1 and 1 for `EpsilonPrediction`, 1 and 100 for `FlowPrediction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .. import functional
from ..sampling.students import alpha_bars, few_step_grid
from .discriminator import LOGIT_LIMIT, cross_entropy, valid_samples

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
FIRST_STEP, LAST_STEP = 20, 979
"""The steps t at which the losses are taken, of 0 … 999."""
PROMPT_DROPOUT = 0.1
"""Share of prompts replaced by the unconditional one where any κ differs from 1."""


class Prediction(Protocol):
    """What a network predicts: how images are noised, and how they come back from its output."""

    time_dtype: torch.dtype
    """Of the t that the network takes."""

    def grid(self, num_steps: int) -> Sequence[float]:
        """t_0 … t_{K−1} of few-step generation."""

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x of the images at t (B,)."""

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """D, the clean images that the network's output means."""

    def implied_noise(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """The n with x = noised(D, n, t)."""

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """What the network's output should be."""


class EpsilonPrediction:
    """ε of a DDPM: x = √ᾱ_t·x0 + √(1−ᾱ_t)·n, D = (x − √(1−ᾱ_t)·ε)/√ᾱ_t, on the "scaled_linear" schedule.

    Args:
        device: of the latents; the schedule is put there once.
    """

    time_dtype = torch.int64

    def __init__(self, device: torch.device | str | None = None) -> None:
        bars = torch.tensor(alpha_bars(), dtype=torch.float32)
        self.signal = bars.sqrt().to(device)
        self.spread = (1 - bars).sqrt().to(device)

    def grid(self, num_steps: int) -> Sequence[float]:
        """t_i = trunc(625(1 − i/K))."""
        return few_step_grid(num_steps)

    def training_times(self, uniform: Tensor) -> Tensor:
        """(B,) int64, uniform over 20 … 979, from uniform draws (B,) in [0, 1)."""
        count = LAST_STEP - FIRST_STEP + 1
        return (FIRST_STEP + (uniform * count).long()).clamp(max=LAST_STEP)

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _per_sample(self.signal[t], images) * images + _per_sample(self.spread[t], images) * noise

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return (x - _per_sample(self.spread[t], x) * output) / _per_sample(self.signal[t], x)

    def implied_noise(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        return (x - _per_sample(self.signal[t], x) * denoised) / _per_sample(self.spread[t], x)

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        return noise


class FlowPrediction:
    """v of a rectified flow: x = (1−t)·x0 + t·n, v = n − x0, D = x − t·v."""

    time_dtype = torch.float32

    def grid(self, num_steps: int) -> Sequence[float]:
        """t_i = 1 − i/K."""
        return [1 - i / num_steps for i in range(num_steps)]

    def training_times(self, normal: Tensor) -> Tensor:
        """(B,) t = sigmoid(ln 2 + 1.6·n) from normal draws (B,): we read N(ln 2, 1.6) as mean and deviation."""
        return torch.sigmoid(math.log(2) + 1.6 * normal)

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return _per_sample(1 - t, images) * images + _per_sample(t, images) * noise

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return x - _per_sample(t, x) * output

    def implied_noise(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        return (x - _per_sample(1 - t, x) * denoised) / _per_sample(t, x)

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        return noise - images


FLOW_WEIGHTS = ("1/omega", "1-t", "(1-t)/t", "((1-t)/t)^2")


def flow_weight(name: str, t: Tensor) -> Tensor | None:
    """The student loss's weight (B,) at t (B,), one of `FLOW_WEIGHTS`; None for "1/omega", which the loss makes itself.

    "1-t" is the published default.

    Raises:
        ValueError: an unknown name.
    """
    if name not in FLOW_WEIGHTS:
        raise ValueError(f"the weight must be one of {', '.join(FLOW_WEIGHTS)}, not {name!r}")
    if name == "1/omega":
        return None
    if name == "1-t":
        return 1 - t
    ratio = (1 - t) / t
    return ratio if name == "(1-t)/t" else ratio**2


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
        if scale is None or not scale < 0:
            raise ValueError(f"anti-cfg needs a negative scale, such as -0.5, not {scale}")
        return Guidance(scale, scale, 1)
    if strategy not in STRATEGIES:
        raise ValueError(f"guidance must be one of {', '.join([*STRATEGIES, 'anti-cfg'])}, not {strategy!r}")
    if scale is not None:
        raise ValueError(f"the scales of {strategy} are fixed: leave out {scale}")
    return STRATEGIES[strategy]


def guided(
    predict: Predict, x: Tensor, t: Tensor, embeddings: Tensor, unconditional: Tensor | None, scale: float
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
    unconditional = unconditional.expand_as(embeddings)
    if scale == 0:
        return predict(x, t, unconditional)
    both = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([unconditional, embeddings]))
    u, c = both.chunk(2)
    return u + scale * (c - u)


def drop_prompts(embeddings: Tensor, unconditional: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Embeddings (B, …) with the unconditional one, (1, …) or (B, …), where uniform (B,) < probability."""
    return torch.where(_per_sample(uniform < probability, embeddings), unconditional, embeddings)


def roll_out(
    predict: Predict,
    latents: Tensor,
    noises: Sequence[Tensor],
    embeddings: Tensor,
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
    embeddings: Tensor,
    unconditional: Tensor | None,
    prediction: Prediction,
    scales: Guidance,
) -> Tensor:
    """‖output_κ1 − target‖², the target being n for ε and n − x_g for flow: the fake score's loss.

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
    target = prediction.target(images, noise)
    return functional.fake_score_loss(output.to(target.dtype), target, weight=valid)


def student_loss(
    teacher: Predict,
    fake: Predict,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
    embeddings: Tensor,
    unconditional: Tensor | None,
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


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))

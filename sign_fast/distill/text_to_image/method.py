"""SiD of latent models with text (SPEC, section 6): losses of one iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...sampling.text import TextConditioning
from ..discriminator import valid_samples
from ..draws import Draws, Stream
from ..latent import (
    diffusion_gan_discriminator_loss,
    diffusion_gan_student_loss,
    drop_prompts,
    fake_score_loss,
    flow_weight,
    roll_out,
    rows_of,
    student_loss,
)
from ..latent_predictions import FlowPrediction, Prediction
from ..method import Losses, Step, set_mode
from ..trained import Trained
from .networks import LatentNetwork, LatentNetworks
from .settings import TextToImageSettings

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class TextStep(Step):
    """One process's part of an iteration, or a chunk of it; `images` are real latents, where there are any.

    Args:
        fake_texts: of the fake score's updates, one each.
        student_text: of the student's update.
        real_text: captions of the real latents.
    """

    fake_texts: tuple[TextConditioning, ...] = ()
    student_text: TextConditioning | None = None
    real_text: TextConditioning | None = None

    def part(self, chunk: slice) -> Self:
        def cut(text: TextConditioning | None) -> TextConditioning | None:
            return None if text is None else text[chunk]

        return dataclasses.replace(
            super().part(chunk),
            fake_texts=tuple(text[chunk] for text in self.fake_texts),
            student_text=cut(self.student_text),
            real_text=cut(self.real_text),
        )


class LatentMethod:
    """‖F_κ1 − target‖² for the fake score and SiD's loss on y_real (κ4) and y_fake (κ2 = κ3) for the student.

    With real latents: the Diffusion-GAN term, whose logits are the channel mean of F's middle block. They are of the
    guided call's rows with the prompt, or of the unconditional ones where κ is 0; the real ones are of the same kind.

    Args:
        settings: of the run.
        networks: of the run.
        prediction: what they predict.
        shape: (C, H, W) of the latents.
        unconditional: one row, the prompt "", on the device of the run.
        student_scale: lsg, by which the caller multiplies.
    """

    def __init__(
        self,
        settings: TextToImageSettings,
        networks: LatentNetworks,
        prediction: Prediction,
        shape: tuple[int, int, int],
        student_scale: float,
        unconditional: TextConditioning | None = None,
    ) -> None:
        self.settings, self.networks, self.prediction = settings, networks, prediction
        self.shape, self.student_scale, self.unconditional = shape, student_scale, unconditional
        self.scales = settings.scales
        self.clip: float | None = 1.0 if settings.adversarial else None  # as SiDA

    def latents(
        self, student: Trained | LatentNetwork, draws: Draws, streams: tuple[Stream, Stream], text: Any, call: int
    ) -> Tensor:
        """D_k of the student's roll-out, with gradient through call k where gradients are recorded."""
        s, net = self.settings, self.networks.student
        latent, renoise = streams
        noises = [draws.normal(renoise + i, self.shape) for i in range(1, call)] if s.noise_type == "fresh" else []
        graded = torch.is_grad_enabled()

        def predict(x: Tensor, t: Tensor, given: Any) -> Tensor:
            last = graded and torch.is_grad_enabled()  # the calls before record none
            set_mode(net, last)
            found: Tensor = (student if last else net)(x, t, given)
            return found

        z = draws.normal(latent, self.shape)
        return roll_out(predict, z, noises, text, self.prediction, call, s.steps, noise=s.noise_type)

    def times(self, draws: Draws, stream: Stream) -> Tensor:
        """t (B,) of the losses."""
        if isinstance(self.prediction, FlowPrediction):
            return self.prediction.training_times(draws.normal(stream, (1, 1, 1)).flatten())
        return self.prediction.training_times(draws.uniform(stream).flatten())

    def _dropped(self, text: TextConditioning, draws: Draws, stream: Stream) -> TextConditioning:
        share = self.scales.prompt_dropout
        if not share:
            return text
        found: TextConditioning = drop_prompts(text, self.unconditional, draws.uniform(stream).flatten(), share)
        return found

    def fake_losses(self, fake: Trained, step: Step) -> Losses:
        assert isinstance(step, TextStep)
        draws, nets = step.draws, self.networks
        text = self._dropped(step.fake_texts[draws.repeat], draws, Stream.FAKE_PROMPT)
        with torch.no_grad():
            streams = (Stream.FAKE_LATENT, Stream.FAKE_RENOISE)
            images = self.latents(nets.student, draws, streams, text, step.call)
        set_mode(nets.fake, True)
        t, noise = self.times(draws, Stream.FAKE_LEVEL), draws.normal(Stream.FAKE_NOISE, self.shape)
        given = (images, noise, t, text, self.unconditional, self.prediction, self.scales)
        if not self.settings.adversarial:
            return {"loss_fake": fake_score_loss(fake, *given)}
        assert step.images is not None and step.real_text is not None
        predict, logits = _with_logits(fake)
        losses = {"loss_fake": fake_score_loss(predict, *given)}
        real = self.prediction.noised(step.images, noise, t)
        if self.scales.fake_training:  # the same rows lose their prompts, which else would tell the student's from real
            real_text = self._dropped(step.real_text, draws, Stream.FAKE_PROMPT)
        else:
            real_text = rows_of(self._no_prompt(), len(real))
        logit_real = fake(real, t, real_text, features="only")
        valid, _ = valid_samples(images)
        logit_fake = logits[-1][-len(real) :]
        return losses | {"loss_discriminator": valid * diffusion_gan_discriminator_loss(logit_real, logit_fake)}

    def student_losses(self, student: Trained, step: Step) -> Losses:
        assert isinstance(step, TextStep) and step.student_text is not None
        draws, nets, s = step.draws, self.networks, self.settings
        text = self._dropped(step.student_text, draws, Stream.STUDENT_PROMPT)
        images = self.latents(student, draws, (Stream.STUDENT_LATENT, Stream.STUDENT_RENOISE), text, step.call)
        set_mode(nets.fake, False)
        t, noise = self.times(draws, Stream.STUDENT_LEVEL), draws.normal(Stream.STUDENT_NOISE, self.shape)
        weight = flow_weight(s.flow_weight, t) if isinstance(self.prediction, FlowPrediction) else None
        given = (images, noise, t, text, self.unconditional, self.prediction, self.scales, s.alpha)
        if not step.adversarial:
            return {"loss_student": student_loss(nets.teacher, nets.fake, *given, weight=weight)[0]}
        predict, logits = _with_logits(nets.fake)
        losses = 0.5 * student_loss(nets.teacher, predict, *given, weight=weight)[0]
        valid, _ = valid_samples(images)
        adversarial = valid * diffusion_gan_student_loss(logits[-1][-len(images) :])
        # over lsg, by which the caller multiplies
        return {
            "loss_student": losses,
            "loss_adversarial": 0.5 * s.adversarial_weight / self.student_scale * adversarial,
        }

    def combined_backward(self, fake: Trained, student: Trained, step: Step) -> Losses:
        raise AssertionError("sid-latent alternates")

    def _no_prompt(self) -> TextConditioning:
        assert self.unconditional is not None
        return self.unconditional


def _with_logits(net: Callable[..., Any]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The network as the losses call it, and where its logits go."""
    logits: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, text: Any) -> Tensor:
        output, found = net(x, t, text, features="also")
        logits.append(found)
        return output  # type: ignore[no-any-return]

    return predict, logits

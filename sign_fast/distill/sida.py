"""SiDA: SiD with real images, the fake score's encoder being the discriminator (section 5 of the mathematics)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import functional
from .discriminator import (
    denoise_and_discriminate,
    discriminate,
    discriminator_loss,
    generator_adversarial_loss,
    mean_closeness,
)
from .draws import Stream
from .levels import level_ratio
from .method import Losses, Step, set_mode
from .parallel import average, backward_into_weights
from .sid import SidMethod, detached, fake_levels, noised_for_fake, student_backward
from .trained import Trained


class SidaMethod(SidMethod):
    """SiD's losses, L_D beside the fake score's, and ½·L_SiD + ½·lsg_gan·L_adv for the student once that is on."""

    clip = 1.0

    def fake_losses(self, fake: Trained, step: Step) -> Losses:
        assert step.images is not None
        draws, s = step.draws, self.settings
        images, labels = self.fake_images(step)
        set_mode(self.networks.fake, True)
        noisy, sigma, noise = noised_for_fake(images, draws, s)
        batch = sigma if draws.of_batch() is draws else fake_levels(draws.of_batch(), s)
        y_fake, logit_fake = denoise_and_discriminate(fake, noisy, sigma, labels)
        logit_real = discriminate(fake, step.images + noise, sigma, step.labels)
        return {
            "loss_fake": functional.fake_score_loss(y_fake, images, sigma, self.sigma_data),
            "loss_discriminator": discriminator_loss(
                logit_real,
                logit_fake,
                sigma,
                self.sigma_data,
                weight=functional.denoising_weight(batch, self.sigma_data).mean(),
            ),
        }

    def student_losses(self, student: Trained, step: Step) -> Losses:
        if not step.adversarial:
            return super().student_losses(student, step)
        images, labels, terms = self.student_images(student, step)
        noisy, sigma = self.noised(images, step)
        set_mode(self.networks.fake, False)
        y_real = self.networks.teacher(noisy, sigma, labels)
        y_fake, logits = denoise_and_discriminate(self.networks.fake, noisy, sigma, labels)
        return terms | {
            "loss_student": 0.5 * functional.sid_generator_loss(images, y_real, y_fake, self.settings.alpha),
            "loss_adversarial": self._adversarial_loss(logits, images, y_real, step),
        }

    @torch.no_grad()
    def closeness(self, step: Step) -> Tensor:
        """The mean 1/ω of the student's loss on these samples, at the cost of a student and a teacher pass."""
        images, labels, _ = self.student_images(self.networks.student, dataclasses.replace(step, pairs=None))
        noisy, sigma = self.noised(images, step)
        return mean_closeness(images, self.networks.teacher(noisy, sigma, labels))

    def _adversarial_loss(self, logits: Tensor, images: Tensor, y_real: Tensor, step: Step) -> Tensor:
        """½·lsg_gan·L_adv over lsg, by which the caller multiplies; the mean 1/ω is that of the whole batch."""
        s = self.settings
        weight = average(mean_closeness(images, y_real)) if step.closeness is None else step.closeness
        scale = 0.5 * s.adversarial_weight / s.student_scale
        return scale * generator_adversarial_loss(logits, images, y_real, weight=weight)

    def combined_backward(self, fake: Trained, student: Trained, step: Step) -> Losses:
        """One forward of the student and one of the fake score with its logits serve all four losses."""
        assert step.images is not None
        s, nets = self.settings, self.networks
        images, labels, terms = self.student_images(student, step)
        data = images.detach()
        sigma = self.student_levels(step.draws)
        noise = sigma * step.draws.normal(Stream.STUDENT_NOISE, self.shape)
        noisy = (data + noise).requires_grad_()
        set_mode(nets.fake, True)
        y_fake, logit_fake = denoise_and_discriminate(fake, noisy, sigma, labels)
        logit_real = discriminate(fake, step.images + noise, sigma, step.labels)
        y_real = nets.teacher(noisy, sigma, labels)
        share = 0.5 if step.adversarial else 1.0
        ratio = level_ratio(sigma, s)
        loss_student, loss_fake, for_images, for_real, for_fake, seed = functional.distill_loss_gradients(
            data,
            y_real.detach(),
            y_fake.detach(),
            sigma,
            s.alpha,
            self.sigma_data,
            fake_weight=ratio,
            student_scale=share * student.factor,
            fake_scale=fake.factor,
        )
        batch = sigma if step.draws.of_batch() is step.draws else self.student_levels(step.draws.of_batch())
        weight = (level_ratio(batch, s).flatten() * functional.denoising_weight(batch, self.sigma_data)).mean()
        loss_discriminator = discriminator_loss(logit_real, logit_fake, sigma, self.sigma_data, weight=weight)
        backward_into_weights(
            [y_fake, fake.scaled([loss_discriminator])], [fake.scaler.scale(seed), None], fake.weights, noisy
        )
        outputs, seeds = [y_real, y_fake], [*student.scaler.scale([for_real, for_fake])]
        losses = detached(terms) | {"loss_fake": loss_fake, "loss_discriminator": loss_discriminator.detach()}
        if step.adversarial:
            adversarial = self._adversarial_loss(logit_fake, data, y_real, step)
            outputs.append(student.scaled([adversarial]))
            seeds.append(torch.ones_like(outputs[-1]))
            losses["loss_adversarial"] = adversarial.detach()
        (through,) = torch.autograd.grad(outputs, noisy, seeds)
        student_backward(student, images, student.scaler.scale(for_images) + through, terms)
        return losses | {"loss_student": share * loss_student}

"""SiD, score identity distillation (Zhou et al. 2024), one-step and few-step: losses of one iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..models.precond import Precond
from .draws import Draws, Stream
from .levels import call_levels, fake_sigma, level_ratio, student_sigma
from .method import Losses, Step, set_mode
from .networks import Networks
from .parallel import backward_into_weights
from .settings import DistillSettings
from .trained import Trained


class SidMethod:
    """L_F = Σ w(σ)(F(x_g+σn;σ) − x_g)² and L_G = Σ (y_r − y_f)·((y_r − x_g) − α(y_r − y_f))/ω (SiD, Algorithm 1).

    Args:
        settings: of the run.
        networks: of the run.
    """

    clip: float | None = None

    def __init__(self, settings: DistillSettings, networks: Networks) -> None:
        self.settings = settings
        self.networks = networks
        teacher = networks.teacher
        self.shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
        self.label_dim = teacher.label_dim
        self.sigma_data = getattr(teacher, "sigma_data", 0.5)
        self.levels = call_levels(settings)

    def student_input(self, draws: Draws, latent: Stream, renoise: int, labels: Tensor | None, call: int) -> Tensor:
        """x of the given call (1 … K): σ_1·z, or D_{k−1} + σ_k·n after k − 1 calls without gradient.

        Returns:
            (n, C, H, W) float32.
        """
        student = self.networks.student
        x = self.levels[0] * draws.normal(latent, self.shape)
        if call > 1:
            set_mode(student, False)
            with torch.no_grad():
                for i in range(1, call):
                    denoised = student(x, self.levels[i - 1], labels)
                    x = denoised + self.levels[i] * draws.normal(renoise + i, self.shape)
        return x

    def fake_losses(self, fake: Trained, step: Step) -> Losses:
        images, labels = self.fake_images(step)
        set_mode(self.networks.fake, True)
        noisy, sigma, _ = noised_for_fake(images, step.draws, self.settings)
        return {"loss_fake": functional.fake_score_loss(fake(noisy, sigma, labels), images, sigma, self.sigma_data)}

    def fake_images(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """The student's images without gradient, and their labels."""
        labels = step.draws.labels(Stream.FAKE_LABEL, self.label_dim)
        set_mode(self.networks.student, False)
        with torch.no_grad():
            x = self.student_input(step.draws, Stream.FAKE_LATENT, Stream.FAKE_RENOISE, labels, step.call)
            return self.networks.student(x, self.levels[step.call - 1], labels), labels

    def student_losses(self, student: Trained, step: Step) -> Losses:
        images, labels, terms = self.student_images(student, step)
        noisy, sigma = self.noised(images, step)
        set_mode(self.networks.fake, False)
        y_real = self.networks.teacher(noisy, sigma, labels)
        y_fake = self.networks.fake(noisy, sigma, labels)
        return terms | {"loss_student": functional.sid_generator_loss(images, y_real, y_fake, self.settings.alpha)}

    def combined_backward(self, fake: Trained, student: Trained, step: Step) -> Losses:
        """The student's levels serve both losses; `level_ratio` makes up for it in the fake score's."""
        nets = self.networks
        images, labels, terms = self.student_images(student, step)
        data = images.detach()
        noisy, sigma = self.noised(data, step)
        noisy.requires_grad_()
        set_mode(nets.fake, True)
        y_fake = fake(noisy, sigma, labels)
        y_real = nets.teacher(noisy, sigma, labels)
        loss_student, loss_fake, for_images, for_real, for_fake, seed = functional.distill_loss_gradients(
            data,
            y_real.detach(),
            y_fake.detach(),
            sigma,
            self.settings.alpha,
            self.sigma_data,
            fake_weight=level_ratio(sigma, self.settings),
            student_scale=student.factor,
            fake_scale=fake.factor,
        )
        # one graph, two seeds: the first goes to the fake score's weights only, the second to the image only
        backward_into_weights([y_fake], [fake.scaler.scale(seed)], fake.weights, noisy)
        for_images, for_real, for_fake = student.scaler.scale([for_images, for_real, for_fake])
        (through,) = torch.autograd.grad([y_real, y_fake], noisy, [for_real, for_fake])
        student_backward(student, images, for_images + through, terms)
        return detached(terms) | {"loss_fake": loss_fake, "loss_student": loss_student}

    def student_images(self, student: Trained | Precond, step: Step) -> tuple[Tensor, Tensor | None, Losses]:
        """The student's images, with gradient, their labels, and its losses that need no score.

        That is "reg", reg·Σ(G(σ_k z; σ_k) − y)² on the teacher's pairs of call k where there are any (DMD, eq. 9, in
        pixels): y is where the teacher's ODE leads from σ_k z.
        """
        draws = step.draws
        labels = draws.labels(Stream.STUDENT_LABEL, self.label_dim)
        x = self.student_input(draws, Stream.STUDENT_LATENT, Stream.STUDENT_RENOISE, labels, step.call)
        sigma = self.levels[step.call - 1]
        set_mode(self.networks.student, True)
        if step.pairs is None:
            return student(x, sigma, labels), labels, {}
        z, y, pair_labels = step.pairs
        if z.ndim == 5:
            z, y = z[:, step.call - 1], y[:, step.call - 1]
        both = torch.cat([x, sigma * z]).contiguous(memory_format=torch.channels_last)
        all_labels = None if labels is None or pair_labels is None else torch.cat([labels, pair_labels])
        images, regressed = student(both, sigma, all_labels).split([len(x), len(z)])
        return images, labels, {"reg": self.settings.reg * squared_distance(regressed, y)}

    def student_levels(self, draws: Draws) -> Tensor:
        """(n, 1, 1, 1) σ."""
        return student_sigma(draws.uniform(Stream.STUDENT_LEVEL), self.settings.tmax, self.settings.tmin)

    def noised(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(x_g + σn, σ) at the student's levels."""
        sigma = self.student_levels(step.draws)
        return images + sigma * step.draws.normal(Stream.STUDENT_NOISE, self.shape), sigma


def fake_levels(draws: Draws, settings: DistillSettings) -> Tensor:
    """(n, 1, 1, 1) σ of the fake score's own loss."""
    return fake_sigma(draws.normal(Stream.FAKE_LEVEL, (1, 1, 1)), settings.P_mean, settings.P_std)


def noised_for_fake(images: Tensor, draws: Draws, settings: DistillSettings) -> tuple[Tensor, Tensor, Tensor]:
    """(x_g + σn, σ, σn) of the fake score's own loss, NaN in an image replaced by 0.

    The loss drops an image that is NaN; inside the network it would spoil the gradients of all.
    """
    sigma = fake_levels(draws, settings)
    noise = sigma * draws.normal(Stream.FAKE_NOISE, (images.shape[1], images.shape[2], images.shape[3]))
    return torch.nan_to_num(images) + noise, sigma, noise


def student_backward(student: Trained, images: Tensor, seed: Tensor, terms: Losses) -> None:
    """From the images with their scaled gradient, and from the other terms, in one pass."""
    if terms:
        torch.autograd.backward([images, student.scaled(list(terms.values()))], [seed, None])
    else:
        images.backward(seed)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) Σ(a − b)²."""
    return (a - b).square().flatten(1).sum(1)


def detached(terms: Losses) -> Losses:
    """For the log."""
    return {name: loss.detach() for name, loss in terms.items()}

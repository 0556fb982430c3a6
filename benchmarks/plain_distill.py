"""The baseline of training: SiD's alternating iteration as the published loop does it, in ordinary PyTorch, NCHW.

Networks by `benchmarks.plain`, autograd from end to end, torch.optim.Adam as it comes, one nan_to_num a gradient, one
lerp a parameter for the average. Nothing of `sign_fast.functional` or `sign_fast.distill` is called.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import Plain

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of the generator step's noise levels
LOW, HIGH = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)


@dataclass
class StepDraws:
    """Random numbers of one of an iteration's two steps.

    Args:
        latent, noise: (B, C, H, W) standard normal.
        level: (B, 1, 1, 1), of the noise level: standard normal in the fake score's step, else uniform in [0, 1).
        labels: (B, label_dim) one-hot rows, or None without classes.
    """

    latent: Tensor
    level: Tensor
    noise: Tensor
    labels: Tensor | None = None


def _without_nan(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The samples in which no tensor has a NaN."""
    bad = torch.stack([t.isnan().flatten(1).any(1) for t in tensors]).any(0)
    return tuple(t[~bad] for t in tensors) if bad.any() else tensors


def fake_loss(y_fake: Tensor, images: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Σ w(σ)(F − x)² over everything, w = (σ² + s²)/(σs)²."""
    weight = ((sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2).expand_as(images)
    y_fake, images, weight = _without_nan(y_fake, images, weight)
    return (weight * (y_fake - images) ** 2).sum()


def generator_loss(images: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float) -> Tensor:
    """Σ (y_r − y_f)·((y_r − x) − α(y_r − y_f))/ω, ω = mean|x − y_r| of each sample, without gradient."""
    images, y_real, y_fake = _without_nan(images, y_real, y_fake)
    with torch.no_grad():
        omega = (images - y_real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
    difference = y_real - y_fake
    return (difference * ((y_real - images) - alpha * difference) / omega).sum()


class PlainSiD:
    """A teacher, its fake score, its student and the student's average, and the iteration that trains them.

    Args:
        teacher: a network of `sign_fast.models` with its weights in NCHW; it is copied.
        batch: images an iteration.
        alpha, sigma_init, tmax, fake_scale, student_scale: of the losses.
        lr, betas, eps: of both Adams.
        ema_halflife, ema_rampup: of the average, in images.
        autocast: the dtype in which networks run under torch.autocast; None runs them in float32.
    """

    def __init__(
        self,
        teacher: Any,
        batch: int,
        *,
        alpha: float = 1.2,
        sigma_init: float = 2.5,
        tmax: float = 800,
        fake_scale: float = 1,
        student_scale: float = 100,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        ema_halflife: float = 500_000,
        ema_rampup: float = 0.05,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.batch = batch
        self.alpha, self.sigma_init, self.tmax = alpha, sigma_init, tmax
        self.fake_scale, self.student_scale = fake_scale, student_scale
        self.ema_halflife, self.ema_rampup = ema_halflife, ema_rampup
        self.autocast = autocast
        self.teacher, self.fake, self.student, self.ema = (Plain(copy.deepcopy(teacher)) for _ in range(4))
        self.teacher.eval().requires_grad_(False)
        self.ema.eval().requires_grad_(False)
        self.fake_optimizer = torch.optim.Adam(self.fake.parameters(), lr, betas, eps)
        self.student_optimizer = torch.optim.Adam(self.student.parameters(), lr, betas, eps)
        self.device = next(self.teacher.parameters()).device
        self.sigma_data = getattr(teacher, "sigma_data", 0.5)
        self.images_seen = 0
        self.beta = 0.0

    def draw(self, uniform: bool) -> StepDraws:
        """Random numbers of a step from PyTorch's generator; `uniform` those of the generator step."""
        side = self.teacher.img_resolution
        shape = (self.batch, self.teacher.img_channels, side, side)
        latent, noise = (torch.randn(shape, device=self.device) for _ in range(2))
        level = (torch.rand if uniform else torch.randn)([self.batch, 1, 1, 1], device=self.device)
        labels = None
        if self.teacher.label_dim:
            classes = torch.randint(self.teacher.label_dim, [self.batch], device=self.device)
            labels = F.one_hot(classes, self.teacher.label_dim).float()
        return StepDraws(latent, level, noise, labels)

    def _precision(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def images(self, draws: StepDraws) -> Tensor:
        """x_g = G(σ_init·z; σ_init)."""
        latent = self.sigma_init * draws.latent
        return self.student(
            latent, torch.full([self.batch, 1, 1, 1], self.sigma_init, device=self.device), draws.labels
        )

    def student_sigma(self, draws: StepDraws) -> Tensor:
        """σ of the generator step: linear in σ^{1/7} between 0.002 and 80."""
        t = draws.level * (self.tmax / 1000)
        return (HIGH + (1 - t) * (LOW - HIGH)) ** RHO

    def _scored(self, draws: StepDraws) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x_g, x_g + σn, σ, y_r, y_f) of the generator step."""
        sigma = self.student_sigma(draws)
        with self._precision():
            images = self.images(draws)
            noisy = images + sigma * draws.noise
            y_real = self.teacher(noisy, sigma, draws.labels)
            y_fake = self.fake(noisy, sigma, draws.labels)
        return images, noisy, sigma, y_real, y_fake

    def fake_step(self, draws: StepDraws) -> Tensor:
        """One update of the fake score; its loss."""
        self.fake_optimizer.zero_grad(set_to_none=True)
        self.fake.train().requires_grad_(True)
        self.student.eval().requires_grad_(False)
        with self._precision():
            with torch.no_grad():
                images = self.images(draws)
            sigma = (1.2 * draws.level - 1.2).exp()
            y_fake = self.fake(images + sigma * draws.noise, sigma, draws.labels)
        loss = fake_loss(y_fake, images, sigma, self.sigma_data) * (self.fake_scale / self.batch)
        loss.backward()
        _update(self.fake_optimizer, self.fake.parameters())
        return loss.detach()

    def generator_step(self, draws: StepDraws) -> Tensor:
        """One update of the student; its loss."""
        self.student_optimizer.zero_grad(set_to_none=True)
        self.student.train().requires_grad_(True)
        self.fake.eval().requires_grad_(False)
        images, _, _, y_real, y_fake = self._scored(draws)
        loss = generator_loss(images, y_real, y_fake, self.alpha) * (self.student_scale / self.batch)
        loss.backward()
        _update(self.student_optimizer, self.student.parameters())
        return loss.detach()

    @torch.no_grad()
    def average(self) -> None:
        """The average takes in the student."""
        halflife = min(self.ema_halflife, self.ema_rampup * self.images_seen)
        self.beta = 0.5 ** (self.batch / max(halflife, 1e-8))
        for average, p in zip(self.ema.parameters(), self.student.parameters(), strict=True):
            average.copy_(p.lerp(average, self.beta))
        for average, buffer in zip(self.ema.buffers(), self.student.buffers(), strict=True):
            average.copy_(buffer)
        self.images_seen += self.batch

    def iteration(self, fake: StepDraws | None = None, generator: StepDraws | None = None) -> tuple[Tensor, Tensor]:
        """One iteration, from these draws or fresh ones: (fake score's loss, student's loss)."""
        fake_loss = self.fake_step(fake or self.draw(uniform=False))
        student_loss = self.generator_step(generator or self.draw(uniform=True))
        self.average()
        return fake_loss, student_loss

    def combined_iteration(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """One update of both networks on the same images: (fake score's loss, student's loss).

        Not published: what the library's combined update is checked against, in more passes. The levels are the
        generator step's, and the fake score's loss is weighted with the ratio of the densities of lnσ: N(−1.2, 1.2²)
        over du/dlnσ of the uniform draw u.
        """
        self.fake_optimizer.zero_grad(set_to_none=True)
        self.student_optimizer.zero_grad(set_to_none=True)
        for net in (self.fake, self.student):
            net.train().requires_grad_(True)
        images, noisy, sigma, y_real, y_fake = self._scored(draws)
        with self._precision():
            y_learnt = self.fake(noisy.detach(), sigma, draws.labels)
        published = torch.distributions.Normal(-1.2, 1.2).log_prob(sigma.log()).exp()
        drawn = 1000 / self.tmax * sigma ** (1 / RHO) / (RHO * (HIGH - LOW))
        root = (published / drawn).sqrt()
        student_loss = generator_loss(images, y_real, y_fake, self.alpha) * (self.student_scale / self.batch)
        weighted = fake_loss(root * y_learnt, root * images.detach(), sigma, self.sigma_data)
        loss = weighted * (self.fake_scale / self.batch)
        loss.backward()
        student_loss.backward(inputs=list(self.student.parameters()))
        _update(self.fake_optimizer, self.fake.parameters())
        _update(self.student_optimizer, self.student.parameters())
        self.average()
        return loss.detach(), student_loss.detach()


def _update(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        if p.grad is not None:
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
    optimizer.step()

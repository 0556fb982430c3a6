"""SIGN, score-based idempotent distillation (arXiv:2509.21470): the six terms of one iteration.

The paper's weights, schedules and coordinates are not known; those here are this library's. All is in flow coordinates
u = (1−t)·x + t·ε, where a denoiser's x̂0(u, t) is D(u/(1−t); σ) with σ = t/(1−t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..models.precond import Precond
from ..sampling.edm import karras_sigmas
from .draws import Draws, Stream
from .levels import T_MAX, T_MIN, fake_density
from .method import Losses, Step, set_mode
from .networks import Networks
from .settings import DistillSettings
from .sid import detached, noised_for_fake, squared_distance
from .trained import Trained


def flow_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7) -> list[float]:
    """t_i = σ_i/(1+σ_i), falling, of EDM's σ_i, i = 0 … N−1, and then 0 (EDM, eq. 5)."""
    sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, rho).tolist()
    return [sigma / (1 + sigma) for sigma in sigmas] + [0.0]


def ode_step(u: Tensor, t: Tensor, t_next: Tensor, denoised: Tensor) -> Tensor:
    """One Euler step of the teacher's probability-flow ODE from t to t_next in flow coordinates.

    With the denoised image D the direction at t is (u − D)/t, so that u_next = D + (u − D)·t_next/t: exact for a
    teacher whose D does not change along the step, and D itself at t_next = 0.

    Args:
        u, denoised: (B, C, H, W). t, t_next: (B, 1, 1, 1), t > 0.
    """
    return denoised + (u - denoised) * (t_next / t)


class SignMethod:
    """L = rec·L_rec + idem·L_idem + flow·L_flow + dmd·L_dmd + reg·L_reg, and den·L_den for the fake score.

    Args:
        settings: of the run.
        networks: of the run, with a frozen copy of the student.
    """

    clip: float | None = None

    def __init__(self, settings: DistillSettings, networks: Networks) -> None:
        assert networks.frozen is not None
        self.settings = settings
        self.networks = networks
        self.frozen: Precond = networks.frozen
        teacher = networks.teacher
        self.shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
        self.label_dim = teacher.label_dim
        self.sigma_data = getattr(teacher, "sigma_data", 0.5)
        self.grid = torch.tensor(flow_grid(settings.flow_steps), device=next(teacher.parameters()).device)

    def fake_losses(self, fake: Trained, step: Step) -> Losses:
        """L_den: the fake score's denoising loss on the student's images."""
        draws, s, student = step.draws, self.settings, self.networks.student
        labels = draws.labels(Stream.FAKE_LABEL, self.label_dim)
        set_mode(student, False)
        with torch.no_grad():
            images = student(draws.normal(Stream.FAKE_LATENT, self.shape), labels)
        set_mode(self.networks.fake, True)
        noisy, sigma, _ = noised_for_fake(images, draws, s)
        loss = functional.fake_score_loss(fake(noisy, sigma, labels), images, sigma, self.sigma_data)
        return {"loss_fake": s.den * loss}

    def student_losses(self, student: Trained, step: Step) -> Losses:
        g, labels, terms = self._terms(student, step)
        if self.settings.dmd:
            terms[self.settings.matching] = self.settings.dmd * self._matching(g, step.draws, labels)
        return terms

    def combined_backward(self, fake: Trained, student: Trained, step: Step) -> Losses:
        """One forward of the student's g and one of the fake score serve L_dmd and L_den."""
        s, nets = self.settings, self.networks
        g, labels, terms = self._terms(student, step)
        data = g.detach()
        noisy, sigma, density = self._noised(data, step.draws)
        set_mode(nets.fake, True)
        y_fake = fake(noisy, sigma, labels)
        with torch.no_grad():
            y_real = nets.teacher(noisy, sigma, labels)
        weight = s.den * fake_density(sigma, s) / density
        loss_fake = weight.flatten() * functional.fake_score_loss(y_fake, data, sigma, self.sigma_data)
        fake.scaled([loss_fake]).backward()
        terms["dmd"] = s.dmd * functional.distribution_matching_loss(g, y_real, y_fake.detach())
        student.scaled(list(terms.values())).backward()
        return detached(terms) | {"loss_fake": loss_fake.detach()}

    def _terms(self, student: Trained, step: Step) -> tuple[Tensor, Tensor | None, Losses]:
        """g = f(z), its labels, and every term but the matching one, weighted."""
        s, nets, draws = self.settings, self.networks, step.draws
        images, image_labels = step.images, step.labels
        assert images is not None
        labels = draws.labels(Stream.STUDENT_LABEL, self.label_dim)
        inputs = {"z": (draws.normal(Stream.STUDENT_LATENT, self.shape), labels)}
        if s.rec:
            inputs["x"] = (images, image_labels)
        if s.flow:
            index = (draws.uniform(Stream.FLOW_LEVEL) * s.flow_steps).long()
            t, t_next = self.grid[index], self.grid[index + 1]
            u = (1 - t) * images + t * draws.normal(Stream.FLOW_NOISE, self.shape)
            inputs["u"] = (u, image_labels)
        if s.reg and step.pairs is not None:
            inputs["pair"] = (step.pairs[0], step.pairs[2])
        set_mode(nets.student, True)
        outputs = _together(student, inputs)
        g = outputs["z"]
        terms: Losses = {}
        if s.rec:
            terms["rec"] = s.rec * squared_distance(outputs["x"], images)
        if s.idem:
            terms["idem"] = (s.idem * step.idem) * squared_distance(self.frozen(g, labels), g)
        if s.flow:
            with torch.no_grad():
                denoised = nets.teacher(u / (1 - t), t / (1 - t), image_labels)
                u_next = ode_step(u, t, t_next, denoised)
                target = torch.where(t_next > 0, self.frozen(u_next, image_labels), u_next)
            terms["flow"] = s.flow * squared_distance(outputs["u"], target)
        if s.reg and step.pairs is not None:
            terms["reg"] = s.reg * squared_distance(outputs["pair"], step.pairs[1])
        return g, labels, terms

    def _noised(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(g + σε, σ, density of lnσ) with t ~ U(0.02, 0.98), σ = t/(1−t): dt/dlnσ = t(1−t)."""
        t = T_MIN + (T_MAX - T_MIN) * draws.uniform(Stream.STUDENT_LEVEL)
        sigma = t / (1 - t)
        noise = draws.normal(Stream.STUDENT_NOISE, self.shape)
        return images + sigma * noise, sigma, t * (1 - t) / (T_MAX - T_MIN)

    def _matching(self, g: Tensor, draws: Draws, labels: Tensor | None) -> Tensor:
        """L_dmd, or the SiD loss in its place: (n,)."""
        s, nets = self.settings, self.networks
        set_mode(nets.fake, False)
        with torch.set_grad_enabled(s.matching == "sid"):
            noisy, sigma, _ = self._noised(g, draws)
            y_real, y_fake = nets.teacher(noisy, sigma, labels), nets.fake(noisy, sigma, labels)
        if s.matching == "sid":
            return functional.sid_generator_loss(g, y_real, y_fake, s.alpha)
        return functional.distribution_matching_loss(g, y_real, y_fake)


def _together(student: Trained, inputs: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """f of all inputs in one call: it takes no time, so they go together."""
    labels = [label for _, label in inputs.values() if label is not None]
    out = student(torch.cat([x for x, _ in inputs.values()]), torch.cat(labels) if labels else None)
    return dict(zip(inputs, out.split([len(x) for x, _ in inputs.values()]), strict=True))

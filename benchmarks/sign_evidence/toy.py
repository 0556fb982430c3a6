"""SIGN where the truth is known: mixtures of Gaussians in the plane, as 1×1 images of two channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sign_fast.distill.draws import Draws
from sign_fast.distill.iteration import Iteration
from sign_fast.distill.networks import Networks
from sign_fast.distill.settings import DistillSettings
from sign_fast.models.precond import edm_coefficients
from sign_fast.sampling import edm_sampler
from sign_fast.training.ema import ema_beta, update_ema
from sign_fast.training.losses import EDMLoss, denoising_loss
from sign_fast.training.schedule import learning_rate_factor
from sign_fast.training.seeds import generator_for, seed_of

SIGMA_DATA = 0.5
_TEACHER, _IMAGES, _PAIRS, _CHOICE, _SAMPLES = 1, 2, 3, 4, 5  # streams of random numbers
HIGH_QUALITY = 3.0
"""A sample this many standard deviations or less from its nearest mode is of high quality."""
COVERED = 0.1
"""A mode is covered if it has at least this share of its due number of high-quality samples, and three."""


@dataclass(frozen=True)
class Modes:
    """Equal Gaussians around `centres` (M, 2), each coordinate of the whole with standard deviation 0.5 or nearly."""

    name: str
    centres: Tensor
    std: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2, 1, 1) samples."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return (self.centres[which] + self.std * noise)[..., None, None]


def ring(std: float = 0.03) -> Modes:
    """Eight modes on a circle."""
    angles = torch.arange(8) * (2 * torch.pi / 8)
    return Modes("ring of 8", torch.stack([angles.cos(), angles.sin()], 1) * (2**0.5 * SIGMA_DATA), std)


def grid(std: float = 0.02) -> Modes:
    """Five times five modes on a square."""
    line = torch.arange(-2, 3) * (SIGMA_DATA / 2**0.5)
    return Modes("grid of 25", torch.cartesian_prod(line, line), std)


DENSITIES: dict[str, Callable[[], Modes]] = {"ring": ring, "grid": grid}


@dataclass(frozen=True)
class Coverage:
    """How well samples cover a mixture.

    Args:
        covered: modes with at least `COVERED` of their due number of high-quality samples.
        modes: of the mixture.
        high_quality: share of the samples within `HIGH_QUALITY` standard deviations of a mode; of true samples 0.989.
        kl: Σ p ln(p·M) in nats of the nearest modes' histogram p against the uniform one.
        thickness: the smaller standard deviation of the high-quality samples within a mode, over the true one, mean
            over the covered modes; about 0.96 of true samples, 0 where modes shrank to curves or points, None where
            none is covered.
    """

    covered: int
    modes: int
    high_quality: float
    kl: float
    thickness: float | None


def coverage(samples: Tensor, modes: Modes) -> Coverage:
    """Of (N, 2, 1, 1) samples; one that is not finite is near no mode."""
    points = samples.flatten(1).double()
    distance, nearest = torch.cdist(points, modes.centres.double()).min(1)
    good = distance <= HIGH_QUALITY * modes.std
    count = len(modes.centres)
    hits = torch.bincount(nearest[good], minlength=count)
    share = torch.bincount(nearest[points.isfinite().all(1)], minlength=count) / len(points)
    kl = torch.special.xlogy(share, share * count).sum()
    covered = (hits >= max(3, COVERED * len(points) / count)).nonzero().flatten().tolist()
    smallest = [torch.linalg.eigvalsh(points[good & (nearest == mode)].T.cov())[0].clamp(min=0) for mode in covered]
    thickness = float(torch.stack(smallest).sqrt().mean()) / modes.std if covered else None
    return Coverage(len(covered), count, float(good.double().mean()), float(kl), thickness)


class Denoiser(nn.Module):
    """D(x; σ) with EDM's preconditioning around a perceptron; what `sign_fast` asks of a teacher, in two dimensions.

    It sees sines and cosines of the coordinates too: a plain perceptron finds no pattern of several modes a turn.
    """

    img_channels, img_resolution, label_dim, sigma_data = 2, 1, 0, SIGMA_DATA
    sigma_min, sigma_max = 0.0, float("inf")
    dtype = torch.float32
    position_scales: Tensor
    level_scales: Tensor

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("position_scales", torch.tensor([1.0, 2.0, 4.0, 8.0]))
        self.register_buffer("level_scales", 2 ** torch.linspace(-1, 3, 8))
        sizes = [2 * 4 * 2 + 8 * 2, width, width, width]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        x = x.float()
        level = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = edm_coefficients(level, SIGMA_DATA)
        position = ((c_in * x).flatten(1)[..., None] * self.position_scales).flatten(1)
        level = (c_noise.reshape(-1, 1) * self.level_scales).expand(len(x), -1)
        h = torch.cat([position.cos(), position.sin(), level.cos(), level.sin()], 1)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return c_skip * x + c_out * self.out(h)[..., None, None]

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return torch.as_tensor(sigma)


class Student(nn.Module):
    """f(u) = D((1+σ)u; σ) at a frozen σ, as `IdempotentPrecond` begins."""

    time_free = True
    img_channels, img_resolution, label_dim = 2, 1, 0
    dtype = torch.float32

    def __init__(self, denoiser: Denoiser, sigma: float = 80.0) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(denoiser)
        self.sigma = sigma

    def forward(self, u: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.denoiser((1 + self.sigma) * u, self.sigma)


def train_teacher(modes: Modes, iterations: int, seed: int = 0, batch: int = 512, lr: float = 3e-3) -> Denoiser:
    """A denoiser trained as EDM's are: its loss, Adam with a cosine, the average of the weights."""
    cpu = torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, _TEACHER))
        net = Denoiser()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_factor(i * batch, 0, iterations * batch, "cosine")
        generator = generator_for(cpu, seed, _TEACHER, i)
        losses = denoising_loss(EDMLoss(), net, modes.draw(batch, generator), None, generator)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        update_ema(ema, net, ema_beta(batch, i * batch, iterations * batch / 20, 0.05))
    return ema


def settings(iterations: int, seed: int = 0, batch: int = 256, **changes: Any) -> DistillSettings:
    """SIGN's, in proportion to the length of the run."""
    kimg = iterations * batch / 1000
    chosen: dict[str, Any] = {
        "batch": batch,
        "kimg": kimg,
        "lr": 1e-3,
        "lr_schedule": "cosine",
        "betas": (0.9, 0.999),
        "fake_betas": (0.0, 0.999),
        "fake_updates": 2,
        "ema_halflife_kimg": kimg / 20,
        "idem_ramp_kimg": kimg / 3,
        "seed": seed,
        "data": "the mixture",
    }
    return DistillSettings("sign", "toy", **(chosen | changes))


def teacher_samples(teacher: Denoiser, z: Tensor) -> Tensor:
    """(N, 2, 1, 1) by 18 Heun steps from z."""
    return edm_sampler(teacher, z, num_steps=18).float()


def latents(count: int, seed: int) -> Tensor:
    """(count, 2, 1, 1) standard normal."""
    return Draws(Draws.seeds_at(seed_of(seed, _SAMPLES), 0, 0, count)).normal(0, (2, 1, 1))


Pairs = tuple[Tensor, Tensor]


def pairs_of(teacher: Denoiser, s: DistillSettings) -> Pairs | None:
    """s.pairs of the teacher's (z, y), which stand in for data and serve the regression; None where none are needed."""
    if not s.needs_pairs:
        return None
    z = latents(s.pairs, seed_of(s.seed, _PAIRS))
    return z, teacher_samples(teacher, z)


def distil(teacher: Denoiser, modes: Modes, s: DistillSettings, pairs: Pairs | None = None) -> Student:
    """The averaged student after the library's own iterations; `pairs` of `pairs_of`, None makes them."""
    teacher.eval().requires_grad_(False)
    student = Student(teacher, s.student_sigma).train().requires_grad_(True)
    fake = copy.deepcopy(teacher).train().requires_grad_(True)
    ema, frozen = (copy.deepcopy(student).eval().requires_grad_(False) for _ in range(2))
    networks = Networks(teacher, fake, student, ema, "Student", {}, frozen)  # type: ignore[arg-type]
    updates = Iteration(s, networks)
    cpu = torch.device("cpu")
    pairs = pairs or pairs_of(teacher, s)
    for i in range(s.iterations):
        chosen = None
        if pairs is not None:
            which = torch.randint(s.pairs, (s.batch,), generator=generator_for(cpu, s.seed, _CHOICE, i))
            chosen = (pairs[0][which], pairs[1][which], None)
        images = chosen[1] if s.data is None and chosen else modes.draw(s.batch, generator_for(cpu, s.seed, _IMAGES, i))
        updates.run(i, images, pairs=chosen)
    return ema  # type: ignore[return-value]

"""What a text-to-image run writes while it goes: score gaps, latents' statistics, sample grids, rows and curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...integrations.diffusers.parts import LatentScale
from ...training.processes import raised_together
from ..draws import Draws, Stream
from ..latent import guided, roll_out, rows_of
from ..method import set_mode
from ..parallel import is_sharded
from ..quality import sample_grid
from ..run_monitor import RunMonitor
from .inputs import Text
from .iteration import LatentIteration
from .settings import TextToImageSettings

_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of 1000 steps, or of a flow's time
_TEACHER_CALLS = 20
_DRAWS = 0  # the seed of the first sample


def loss_columns(settings: TextToImageSettings) -> list[str]:
    """The names of all losses and gradient norms that an iteration of these settings may return."""
    more = ["loss_discriminator", "loss_adversarial"] if settings.adversarial else []
    return ["loss_fake", "loss_student", *more, "grad_norm_fake", "grad_norm_student"]


def gap_columns(flow: bool) -> list[str]:
    """The names of the score gaps, e.g. "score_gap_t500"."""
    return [f"score_gap_t{level if flow else round(1000 * level)}" for level in _LEVELS]


class Probe:
    """Samples and figures of the networks on fixed draws and prompts.

    Where networks are in shards all processes call its methods, with the same results.

    Args:
        settings: of the run.
        updates: of the run.
        text: of the prompts, of which some spread over all are taken.
    """

    def __init__(self, settings: TextToImageSettings, updates: LatentIteration, text: Text) -> None:
        self.settings, self.networks, self.method = settings, updates.networks, updates.method
        self.flow = self.method.prediction.time_dtype.is_floating_point
        self.sharded = is_sharded(self.networks.ema)
        count = settings.samples
        numbers = np.linspace(0, len(text) - 1, count).round().astype(np.int64)
        self.text = text.at(numbers)
        self.unconditional = text.unconditional
        self.draws = Draws(torch.arange(_DRAWS, _DRAWS + count).to(updates.device))
        share = settings.batch // (updates.world * settings.accumulation)
        self.chunks = [slice(i, i + share) for i in range(0, count, share)]  # what training has memory for

    @torch.no_grad()
    def samples(self) -> Tensor:
        """(N, C, H, W) latents of the averaged student."""
        streams = (Stream.STUDENT_LATENT, Stream.STUDENT_RENOISE)
        m, steps, ema = self.method, self.settings.steps, self.networks.ema
        found = []
        for chunk in self.chunks:
            draws = self.draws.part(chunk)
            noises = [draws.normal(streams[1] + i, m.shape) for i in range(1, steps)]
            z = draws.normal(streams[0], m.shape)
            noise = self.settings.noise_type
            found.append(roll_out(ema, z, noises, self.text[chunk], m.prediction, steps, steps, noise=noise))
        return torch.cat(found)

    @torch.no_grad()
    def of_teacher(self) -> Tensor:
        """(N, C, H, W) latents of the teacher, by 20 deterministic steps (DDIM; Euler's for a flow), unguided."""
        p, teacher = self.method.prediction, self.networks.teacher
        grid = p.teacher_grid(_TEACHER_CALLS)
        found = []
        for chunk in self.chunks:
            noise = self.draws.part(chunk).normal(Stream.STUDENT_LATENT, self.method.shape)
            text, images = self.text[chunk], torch.zeros_like(noise)
            for level in grid:
                t = torch.full([len(noise)], level, dtype=p.time_dtype, device=noise.device)
                x = p.noised(images, noise, t)
                images = p.denoised(x, teacher(x, t, text), t)
                noise = p.implied_noise(x, images, t)
            found.append(images)
        return torch.cat(found)

    @torch.no_grad()
    def score_gaps(self, images: Tensor) -> dict[str, float]:
        """RMS of y_real − y_fake on the student's latents at each level, guided as in the student's loss."""
        nets, p, scales = self.networks, self.method.prediction, self.method.scales
        modes = [(module, module.training) for module in nets.fake.modules()]
        set_mode(nets.fake, False)
        found = []
        for level in _LEVELS:
            squares = []
            for chunk in self.chunks:
                noise = self.draws.part(chunk).normal(Stream.STUDENT_NOISE, self.method.shape)
                value = level if self.flow else round(1000 * level)
                t = torch.full([len(noise)], value, dtype=p.time_dtype, device=noise.device)
                x, text = p.noised(images[chunk], noise, t), self.text[chunk]
                real, fake = (
                    p.denoised(x, guided(net, x, t, text, rows_of(self.unconditional, len(x)), scale), t)
                    for net, scale in ((nets.teacher, scales.teacher), (nets.fake, scales.fake))
                )
                squares.append((real - fake).double().square().mean((1, 2, 3)))
            found.append(torch.cat(squares).mean().sqrt())
        for module, mode in modes:
            module.training = mode
        return dict(zip(gap_columns(self.flow), torch.stack(found).tolist(), strict=True))


def deviation(latents: Tensor) -> float:
    """Standard deviation over samples, channels and places."""
    return float(latents.double().std())


def spread(found: float, reference: float) -> float:
    """How many times a deviation is larger or smaller than another, at least 1; infinite where it is no number."""
    if not (math.isfinite(found) and found > 0 and reference > 0):
        return math.inf
    return max(found / reference, reference / found)


class TextMonitor(RunMonitor):
    """`RunMonitor` that watches the averaged student's latents and draws samples.

    Args:
        settings: of the run.
        probe: of the run.
        reference: the deviation that the latents should have.
        vae, scale: what makes images of latents, on the CPU between checks; None on other processes.
        folder: of the run.
        iteration: done so far; what later ones had logged is dropped.
        device: of the run.
        rank: of this process.
    """

    def __init__(
        self,
        settings: TextToImageSettings,
        probe: Probe,
        reference: float,
        vae: Any,
        scale: LatentScale,
        folder: Path,
        iteration: int,
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self.probe, self.reference, self.vae, self.scale = probe, reference, vae, scale
        tables = {
            "metrics": [*loss_columns(settings), "lr", "images_per_second"],
            "quality": [*gap_columns(probe.flow), "latents_mean", "latents_std", "latents_std_wanted"],
        }
        super().__init__(settings, tables, folder, iteration, device, rank)

    def check(self, iteration: int) -> dict[str, float]:
        """Measure, write the row and the sample grid; all processes call it.

        Returns:
            The row's values on the first process.
        """
        values: dict[str, float] = {}
        images = None
        if self.rank == 0 or self.probe.sharded:
            images = self.probe.samples()
            values = self.probe.score_gaps(images)
            values |= {"latents_mean": float(images.double().mean()), "latents_std": deviation(images)}
            values["latents_std_wanted"] = self.reference
        with raised_together(self.device):
            if self.log is not None and images is not None:
                pixels = self.decoded(images)
                self.log.write_image("samples", iteration, sample_grid(self.folder, iteration, pixels))
        self.write(iteration, values, "quality")
        return values

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 on the CPU."""
        vae = self.vae.to(self.device)
        parts = [vae.decode(self.scale.to_vae(z[None].float())).sample.float().cpu() for z in latents]
        self.vae.to("cpu")
        return (torch.nan_to_num(torch.cat(parts)) * 127.5 + 128).clamp(0, 255).to(torch.uint8)

"""What a run writes while it goes: quality of the averaged student, sample grids, and as every run rows and curves."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import in_range, one_hot
from ..models.precond import Precond
from ..models.presets import CLASSES
from ..training.processes import raised_together
from .draws import Draws
from .held_out import MOST_IMAGES, HeldOut
from .networks import Networks
from .parallel import full_state, is_sharded
from .quality import (
    IDEMPOTENCE_COLUMNS,
    Quality,
    idempotence_and_reconstruction,
    sample_grid,
    sample_images,
    score_gap,
    score_gap_columns,
)
from .run_monitor import RunMonitor
from .settings import DistillSettings

_GRID_IMAGES = 64
_GAP_IMAGES = 128


def loss_columns(settings: DistillSettings) -> list[str]:
    """The names of all losses and gradient norms that an iteration of these settings may return."""
    s = settings
    if s.method == "sign":
        losses = [name for name in ("rec", "idem", "flow", "reg") if getattr(s, name)] + [s.matching] * bool(s.dmd)
    else:
        losses = ["loss_student", *["reg"] * bool(s.reg)]
        losses += ["loss_discriminator", "loss_adversarial"] if s.method == "sida" else []
    if not s.trains_fake_score:
        return [*losses, "grad_norm_student"]
    return ["loss_fake", *losses, "grad_norm_fake", "grad_norm_student"]


def checked_steps(settings: DistillSettings) -> list[int]:
    """Numbers of sampling steps whose quality is measured, that of most interest last.

    Of few-step SiD those whose noise levels are among the K that it is trained at; of SIGN one step and two.
    """
    if settings.method == "sign":
        return [2, 1]
    return [k for k in range(1, settings.steps + 1) if settings.steps % k == 0]


class Monitor(RunMonitor):
    """`RunMonitor` that measures the quality of the averaged student.

    Args:
        settings: of the run.
        networks: of the run, whole or sharded.
        quality: of images; None where there is none for their shape.
        held_out: what SIGN's reconstruction is measured on; None takes the samples.
        samples: the teacher's y and labels, where it has made some.
        folder: of the run.
        iteration: done so far; what later ones had logged is dropped.
        device: of the run.
        rank: of this process.
    """

    def __init__(
        self,
        settings: DistillSettings,
        networks: Networks,
        quality: Quality | None,
        held_out: HeldOut | None,
        samples: tuple[Tensor, Tensor | None] | None,
        folder: Path,
        iteration: int,
        device: torch.device,
        rank: int = 0,
    ) -> None:
        self.settings, self.networks, self.quality = settings, networks, quality
        teacher = networks.teacher
        self.shape = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
        self.steps = checked_steps(settings)
        self.sharded = is_sharded(networks.ema)
        self.held_out = self.held_out_labels = None
        self._gathered: Precond | None = None
        qualities = [f"quality_{k}" for k in self.steps] if quality is not None else []
        gaps = score_gap_columns() if settings.trains_fake_score else []
        idempotence = IDEMPOTENCE_COLUMNS if settings.method == "sign" else []
        tables = {
            "metrics": [*loss_columns(settings), "lr", "images_per_second"],
            "quality": [*qualities, *gaps, *idempotence],
        }
        super().__init__(settings, tables, folder, iteration, device, rank)
        if settings.method == "sign" and rank == 0:
            self.held_out, self.held_out_labels = self._held_out(held_out, samples)

    def _held_out(
        self, held_out: HeldOut | None, samples: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor | None]:
        """(N, C, H, W) in about [-1, 1] and one-hot rows, on the device."""
        if held_out is None:
            assert samples is not None
            images, labels = samples
            return images[:MOST_IMAGES], None if labels is None else labels[:MOST_IMAGES]
        labels = held_out.labels
        return held_out.images.to(self.device), None if labels is None else labels.to(self.device)

    def _cyclic_labels(self, count: int) -> Tensor | None:
        label_dim = self.networks.teacher.label_dim
        return one_hot(torch.arange(count, device=self.device) % max(label_dim, 1), label_dim)

    def check(self, iteration: int) -> dict[str, float]:
        """Measure the averaged student, write the row and the sample grid; all processes call it.

        Returns:
            The row's values on the first process.
        """
        values: dict[str, float] = {}
        ema = self._whole_ema()
        with raised_together(self.device):
            if ema is not None:
                values |= self._of_images(iteration, ema)
        if self.settings.trains_fake_score:
            values |= self._score_gap(ema)
        self.write(iteration, values, "quality")
        return values

    def _score_gap(self, ema: Precond | None) -> dict[str, float]:
        """Where fake score and teacher differ on the student's images; in shards all processes run both."""
        images = torch.empty((_GAP_IMAGES, *self.shape), dtype=torch.uint8, device=self.device)
        label_dim = self.networks.teacher.label_dim
        with raised_together(self.device):
            if ema is not None:
                classes = [i % label_dim for i in range(_GAP_IMAGES)] if label_dim else None
                images = self._sample(ema, _GAP_IMAGES, self.steps[-1], classes)
        if self.sharded:
            images = images.contiguous()
            dist.broadcast(images, 0)
        elif ema is None:
            return {}
        nets, noise, labels = self.networks, self._normal(_GAP_IMAGES), self._cyclic_labels(_GAP_IMAGES)
        return score_gap(nets.teacher, nets.fake, in_range(images), noise, labels=labels)

    def _of_images(self, iteration: int, ema: Precond) -> dict[str, float]:
        """Quality of the student's images, how idempotent it is, and the sample grid."""
        values: dict[str, float] = {}
        count = self.settings.quality_images if self.quality is not None else _GRID_IMAGES
        images = torch.empty(0)
        for k in self.steps if self.quality is not None else self.steps[-1:]:
            images = self._sample(ema, count, k)
            if self.quality is not None:
                values[f"quality_{k}"] = self.quality(images)
        assert self.log is not None
        self.log.write_image("samples", iteration, sample_grid(self.folder, iteration, images[:_GRID_IMAGES]))
        if self.held_out is not None:
            latents = self._normal(len(self.held_out))
            values |= idempotence_and_reconstruction(ema, self.held_out, latents, self.held_out_labels)
        return values

    def _sample(self, ema: Precond, count: int, steps: int, classes: list[int] | None = None) -> Tensor:
        if self.settings.method == "sign":
            return sample_images(ema, "recursive", count, labels=classes, steps=steps)
        return sample_images(ema, "few_step", count, labels=classes, steps=steps, sigma=self.settings.sigma_init)

    def _whole_ema(self) -> Precond | None:
        """The averaged student on the first process, gathered where it is in shards."""
        nets = self.networks
        if not self.sharded:
            return None if self.rank else nets.ema
        state = full_state(nets.ema)
        if self.rank:
            return None
        if self._gathered is None:
            net = CLASSES[nets.student_class](**nets.student_kwargs)
            self._gathered = net.to(self.device).eval().requires_grad_(False)
        self._gathered.load_state_dict(state)
        return self._gathered

    def _normal(self, count: int) -> Tensor:
        """The same noise at every check."""
        return Draws(torch.arange(count).to(self.device)).normal(0, self.shape)

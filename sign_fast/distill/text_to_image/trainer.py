"""A run of `--method sid-latent`: a pipeline of diffusers into a one- or few-step one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...checkpoints.atomic import clean_up
from ...data.image_text import ImageTextFolder
from ...data.prompts import read_prompts
from ...errors import SignFastError
from ...integrations.diffusers.loading import INDEX, load_parts
from ...integrations.diffusers.parts import Parts
from ...training.processes import place, raised_together
from ..divergence import all_finite
from ..latent_predictions import prediction_of
from ..method import Losses
from ..pairs import network_hash
from ..run import Run
from .inputs import Inputs, Text, TextSource, vae_facts, write_latents
from .iteration import LatentIteration
from .monitor import Probe, TextMonitor, deviation, spread
from .networks import build_latent_networks
from .output import card_of, save_pipeline
from .rows import Rows, key_of
from .settings import TextToImageSettings, check_resolution, check_text_fit, check_text_settings, text_remarks

_CACHE = "cache"  # in the run's folder
Told = Callable[[str, int, int], None]
"""told(what, rows, of): so many of a process's rows are made."""


class TextDistiller(Run):
    """One run; `run` goes to its end, resuming from the newest whole state in the folder.

    The text encoders are there until the prompts' embeddings are on disk; the VAE waits on the CPU between checks.

    Args:
        settings: of the run.
        folder: for its results: settings.json, metrics.csv, quality.csv, curves.png, samples-*.png, state-*.pt, cache/
            and network/ (the pipeline with the averaged student of the last save); None keeps nothing but what goes
            into settings.cache, and only `step` works.
        device: where it runs.
        command: what started it, for the model card.
        told: told(what, rows, of) while embeddings and latents are made.

    Raises:
        SignFastError: teacher, prompts, data, processes and settings do not fit, or the folder is in use or of another
            run.
    """

    kind = "sign_fast text-to-image distillation 1"
    mark = INDEX
    settings: TextToImageSettings
    updates: LatentIteration
    monitor: TextMonitor

    def __init__(
        self,
        settings: TextToImageSettings,
        folder: Path | None,
        device: torch.device,
        command: str = "",
        told: Told = lambda what, rows, of: None,
    ) -> None:
        check_text_settings(settings)
        rank, world = place()
        with raised_together(device):
            self._prompts = read_prompts(settings.prompts, settings.prompt_column)
            self._images = ImageTextFolder(settings.data) if settings.data is not None else None
            parts = load_parts(settings.teacher)
            settings = self._fitted(settings, parts, world)
            if parts.settings.get("_class_name") == "SiDPipeline":
                raise SignFastError(
                    f"{settings.teacher} is a student: name the pipeline that it was distilled from as --teacher"
                )
            if not all_finite(parts.unet):
                raise SignFastError(
                    f"the teacher {settings.teacher} has weights that are not finite: it is damaged, name another "
                    "--teacher"
                )
        self.settings, self._told = settings, told
        size = settings.resolution
        assert size is not None
        self.shape = (parts.latent_shape[0], size // parts.pixels, size // parts.pixels)
        config = {**parts.unet.config, "sample_size": self.shape[1]}  # what the student's pipeline makes by itself
        self._unet, self._folder_of_teacher = (type(parts.unet), config), Path(settings.teacher)
        self._vae, self._scale, self._parts = parts.vae.eval().requires_grad_(False), parts.scale, parts
        self._said = {"vae_scaling_factor": parts.scaling_factor, "vae_pixels": parts.pixels}
        self._source = TextSource(parts, settings, size)
        with raised_together(device), warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore", UserWarning)
            assert self._source.encoder is not None
            self._source.encoder.check(self._prompts)  # one remark on those that are cut
            if self._images is not None:
                self._source.encoder.check(self._images.captions)
        self._hashes = self._hash(parts)
        prediction = prediction_of(parts.prediction, device, parts.alpha_bars)
        networks = build_latent_networks(parts, settings, device)
        lsg = settings.student_scale_for(parts.prediction)
        self.updates = LatentIteration(settings, networks, prediction, self.shape, lsg, device)
        self._begin(command, "the latents' distance from their deviation")
        self.notes += text_remarks(settings, world)
        if folder is not None:
            self._open(folder)

    @staticmethod
    def _fitted(settings: TextToImageSettings, parts: Parts, world: int) -> TextToImageSettings:
        """With the resolution and the factor of the loss that fit the teacher."""
        check_text_fit(settings, parts.prediction, world)
        if settings.adversarial and parts.unet.mid_block is None:
            raise SignFastError(
                f"the UNet of {settings.teacher} has no middle block, whose features would tell real latents: leave "
                "--data away"
            )
        sides = parts.image_size
        if settings.resolution is None and sides[0] != sides[1]:
            raise SignFastError(f"the teacher's images are {sides[0]}×{sides[1]}: name a --resolution, of squares")
        size = settings.resolution or sides[0]
        check_resolution(size, parts.pixels, len(parts.unet.config.down_block_types))
        lsg = settings.student_scale_for(parts.prediction)
        return dataclasses.replace(settings, resolution=size, student_scale=lsg)

    def _hash(self, parts: Parts) -> dict[str, tuple[str, str]]:
        """What `_identity` says; settings, which say what differs by its name, are not in it."""
        s = self.settings
        schedule = [parts.prediction, parts.alpha_bars, parts.num_train_timesteps]
        facts = {"unet": network_hash(parts.unet), "schedule": schedule, "text": self._source.facts, **vae_facts(parts)}
        found = {"teacher": (key_of(facts), s.teacher), "prompts": (key_of({}, self._prompts), s.prompts)}
        if self._images is not None and s.data is not None:
            found["data"] = (key_of({"files": self._images.fingerprint()}, self._images.captions), s.data)
        return found

    # ---- what iterations read ----

    @cached_property
    def inputs(self) -> Inputs:
        """Embeddings and latents, made where they are not on disk yet. All processes come here."""
        s, u = self.settings, self.updates
        if s.cache is None and self.folder is None:
            raise SignFastError("embeddings need a folder to be kept in: name a --cache")
        root = Path(s.cache) if s.cache is not None else self.folder / _CACHE  # type: ignore[operator]
        with raised_together(u.device):
            if s.cache is None and u.rank == 0:  # nobody else writes there, as into a shared one
                for path in root.glob("*"):
                    clean_up(path)
        text = self._embedded(root, self._prompts, "prompts")
        latents: Rows | None = None
        captions: Text | None = None
        if self._images is not None:
            captions = self._embedded(root, self._images.captions, "captions")
            assert s.resolution is not None
            latents = write_latents(
                root, self._images, self._parts, s.resolution, u.device, self._counter("images", len(self._images))
            )
        self._source.drop()
        self._prompts, self._images = [], None
        del self._parts
        u.method.unconditional = text.unconditional
        return Inputs(s, text, latents, captions, u.device, u.rank, u.world)

    def _embedded(self, root: Path, prompts: list[str], what: str) -> Text:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on prompts that are cut: said before
            return self._source.write(root, prompts, self.updates.device, self._counter(what, len(prompts) + 1))

    def _counter(self, what: str, of: int) -> Callable[[int], None]:
        made = 0

        def done(rows: int) -> None:
            nonlocal made
            made += rows
            self._told(what, made, of)

        return done

    # ---- iterations ----

    def step(self) -> Losses:
        """One iteration, see `LatentIteration.run`."""
        losses = self.updates.run(self.iteration, self.inputs.at(self.iteration))
        self.iteration += 1
        return losses

    def _prepare(self) -> None:
        inputs, u = self.inputs, self.updates
        self.probe = Probe(self.settings, u, inputs.text)
        reference = torch.zeros((), dtype=torch.float64, device=u.device)
        if inputs.latents is not None:
            first = range(min(len(inputs.latents), 64))
            reference.fill_(deviation(inputs.latents[list(first)]["latents"]))
        elif u.rank == 0 or self.probe.sharded:
            reference.fill_(deviation(self.probe.of_teacher()))
        if u.world > 1:
            dist.broadcast(reference, 0)
        self.reference = float(reference)
        if not (torch.isfinite(reference) and self.reference > 0):
            with raised_together(u.device):
                raise SignFastError(
                    f"the latents of the teacher {self.settings.teacher} have a deviation of {self.reference}: it is "
                    "damaged, or needs --precision fp32"
                )

    def _monitor(self) -> TextMonitor:
        assert self.folder is not None
        u = self.updates
        return TextMonitor(
            self.settings,
            self.probe,
            self.reference,
            None if u.rank else self._vae,
            self._scale,
            self.folder,
            self.iteration,
            u.device,
            u.rank,
        )

    def _check(self, done: bool) -> dict[str, float]:
        """Measure on the first process; all stop together.

        Raises:
            SignFastError: the student's latents have gone astray.
        """
        values = self.monitor.check(self.iteration)
        found = torch.tensor(values.get("latents_std", 0.0), dtype=torch.float64)
        if self.updates.world > 1:
            found = found.to(self.updates.device)
            dist.broadcast(found, 0)
        stop = self.guard.check(self.iteration, spread(float(found), self.reference))
        with raised_together(self.updates.device):
            self.monitor.draw(now=done or bool(stop))
        self._stop(stop)
        return values

    def _trained(self) -> Sequence[nn.Module]:
        nets = self.updates.networks
        return nets.student, nets.ema, nets.fake

    # ---- what is kept ----

    def _identity(self) -> dict[str, tuple[str, str]]:
        return self._hashes

    def _save_network(self, name: str, state: dict[str, Tensor], quality: dict[str, Any] | None = None) -> None:
        if self.updates.rank:
            return
        assert self.folder is not None
        s = self.settings
        kappas = f"κ1 {s.scales.fake_training:g}, κ2 = κ3 {s.scales.fake:g}, κ4 {s.scales.teacher:g}"
        trained = {
            "command": self.command,
            "method": s.method,
            "teacher": s.teacher,
            "prompts": f"{s.prompts}, {len(self.inputs.text):,} of them",
            "real images": s.data or "none",
            "resolution": s.resolution,
            "steps": s.steps,
            "guidance": f"{s.guidance}, {kappas}",
            "noise": s.noise_type,
            "alpha": s.alpha,
            "batch": s.batch,
            "learning rate": s.lr,
            "precision": s.precision,
            "seed": s.seed,
            "iterations": self.iteration,
            "images": self.iteration * s.batch,
        }
        settings = {"num_inference_steps": s.steps, "noise_type": s.noise_type, **self._said}
        card = card_of(self.folder.resolve().name, trained, s.steps)
        save_pipeline(self.folder / name, self._folder_of_teacher, *self._unet, state, settings, card)

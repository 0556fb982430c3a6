"""The training loop of teachers: EDM loss, Adam, EMA, exact resume; one process or several under torchrun."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.atomic import clean_up, make_folder, write_text
from ..checkpoints.card import model_card
from ..checkpoints.lock import FolderLock
from ..checkpoints.store import save_network
from ..data import BatchLoader, Dataset, open_dataset
from ..errors import SignFastError
from ..models.precond import Precond
from ..models.presets import CLASSES
from .ema import ema_beta, update_ema
from .logs import RunLog
from .losses import LOSSES, Loss, denoising_loss
from .processes import data_parallel, place, raised_together
from .schedule import LearningRateSchedule, learning_rate_factor
from .seeds import generator_for, seed_of
from .state import load_newest, save_state, saved_states

_DRAWS, _DROPOUT, _INIT = 1, 2, 3  # streams of random numbers
_ANYTIME = {"kimg", "log_every", "save_every", "keep", "threads"}  # settings that a resumed run may change


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run, written to settings.json beside its results.

    Args:
        data: 'digits' or a folder or zip.
        cls, kwargs: the network, e.g. "EDMPrecond" and its arguments; label_dim > 0 needs labels in the data.
        loss: "edm", "vp" or "ve"; loss_kwargs replace its constants.
        batch: images a step over all processes.
        accumulation: parts into which a process splits its share, for memory.
        kimg: length of the run in thousands of images.
        lr, betas, eps: of Adam. lr_rampup_kimg, lr_schedule: see `learning_rate_factor`.
        ema_halflife_kimg, ema_rampup_ratio: see `ema_beta`.
        xflip: mirror half of the images.
        precision: "fp32", "bf16" or "fp16" of the inner network; weights stay fp32.
        seed: of weights, data order, noise and dropout.
        log_every, save_every: in iterations. keep: number of resumable states kept.
        threads: that decode images.
    """

    data: str
    cls: str
    kwargs: dict[str, Any]
    loss: str = "edm"
    loss_kwargs: dict[str, float] = field(default_factory=dict)
    batch: int = 512
    accumulation: int = 1
    kimg: float = 200_000
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lr_rampup_kimg: float = 10_000
    lr_schedule: LearningRateSchedule = "constant"
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    xflip: bool = False
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 100
    save_every: int = 1000
    keep: int = 2
    threads: int = 2

    @property
    def iterations(self) -> int:
        """Steps of the whole run, the last one complete."""
        return -(-int(self.kimg * 1000) // self.batch)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ["iteration", "kimg", "loss", "lr", "grad_norm", "images_per_second"]


@dataclass
class Progress:
    """What a run tells its caller after each logged step."""

    iteration: int
    iterations: int
    values: dict[str, float]


def _check(settings: TrainSettings, dataset: Dataset, world: int) -> None:
    kwargs = settings.kwargs
    want = (kwargs["img_channels"], kwargs["img_resolution"], kwargs["img_resolution"])
    if dataset.shape != want:
        raise SignFastError(f"the images of {settings.data} are {dataset.shape} (C, H, W), the network takes {want}")
    label_dim = kwargs.get("label_dim", 0)
    if label_dim and not dataset.num_classes:
        raise SignFastError(f"{settings.data} has no labels: add a dataset.json, or train an unconditional network")
    if label_dim and dataset.num_classes > label_dim:
        raise SignFastError(
            f"{settings.data} has {dataset.num_classes} classes, the network {label_dim}: raise label_dim"
        )
    if settings.batch % (world * settings.accumulation):
        raise SignFastError(
            f"a batch of {settings.batch} does not divide into {world} processes × {settings.accumulation} parts: "
            "change --batch"
        )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return {key: value for key, value in plain.items() if key not in _ANYTIME}


def _build(settings: TrainSettings, device: torch.device) -> Precond:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings.seed, _INIT))
        net = CLASSES[settings.cls](**settings.kwargs)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class Trainer:
    """One run; `run` goes to its end, resuming from the newest whole state in the folder.

    Args:
        settings: of the run.
        folder: for its results: settings.json, metrics.csv, state-*.pt, network/ (EMA weights, safetensors).
        device: where it runs.
        command: what started it, for the model card.

    Raises:
        SignFastError: data and network do not fit, or the folder is in use, or holds a run with other settings.
    """

    def __init__(self, settings: TrainSettings, folder: Path, device: torch.device, command: str = "") -> None:
        self.settings = settings
        self.command = command
        self.log_note = ""
        self.device = device
        self.rank, self.world = place()
        self.dataset = open_dataset(settings.data)
        _check(settings, self.dataset, self.world)
        self.folder = folder
        self.loss: Loss = LOSSES[settings.loss](**settings.loss_kwargs)
        self.net = _build(settings, device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.iteration = 0
        self._lock: FolderLock | None = None
        try:
            with raised_together(device):
                make_folder(folder)
                if self.rank == 0:
                    self._lock = FolderLock(folder)
                    self._resume()
            with raised_together(device):
                if self.rank:  # now that the first process has set aside what is damaged
                    self._resume()
        except BaseException:
            self.close()
            raise
        self.ddp: nn.Module = self.net
        if dist.is_available() and dist.is_initialized():
            augmented = bool(settings.kwargs.get("augment_dim"))  # its projection gets no gradient without labels
            self.ddp = data_parallel(self.net, unused=augmented)

    def close(self) -> None:
        """Let the folder go; `run` does so at its end."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _resume(self) -> None:
        state = load_newest(self.folder, set_aside=self.rank == 0)
        if state is None:
            if self.rank == 0:
                clean_up(self.folder, "network")
                write_text(
                    self.folder / "settings.json", json.dumps(dataclasses.asdict(self.settings), indent=1) + "\n"
                )
            return
        before, now = _comparable(state["settings"]), _comparable(dataclasses.asdict(self.settings))
        if before != now:
            changed = ", ".join(key for key in now if now[key] != before.get(key))
            raise SignFastError(f"{self.folder} holds a run with another {changed}: choose another --outdir")
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]
        if self.rank == 0:
            clean_up(self.folder, "network")

    def save(self) -> None:
        """Write a resumable state and the EMA network; rank 0 only does."""
        if self.rank:
            return
        s = self.settings
        trained = {"command": self.command, "data": s.data, "seed": s.seed, "images": self.iteration * s.batch}
        state = {
            "settings": dataclasses.asdict(s),
            "iteration": self.iteration,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_state(self.folder, self.iteration, state, s.keep)
        save_network(
            self.folder / "network",
            self.ema.state_dict(),
            s.cls,
            s.kwargs,
            role="teacher",
            trained=trained,
            card=model_card("network", {"cls": s.cls, "kwargs": s.kwargs, "role": "teacher", "trained": trained}),
        )

    def _step(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.settings
        seen = self.iteration * s.batch
        generator = generator_for(self.device, s.seed, _DRAWS, self.iteration)
        torch.manual_seed(seed_of(s.seed, _DROPOUT, self.iteration, self.rank))
        factor = learning_rate_factor(seen, int(s.lr_rampup_kimg * 1000), int(s.kimg * 1000), s.lr_schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        first = self.rank * s.batch // self.world
        part = len(images) // s.accumulation
        # the draws of the whole batch come from one generator state, whatever the split
        start_state = generator.get_state()
        for i in range(s.accumulation):
            chunk = slice(i * part, (i + 1) * part)
            generator.set_state(start_state)
            last = i == s.accumulation - 1
            sync = self.ddp.no_sync() if isinstance(self.ddp, DistributedDataParallel) and not last else nullcontext()
            with sync:
                losses = denoising_loss(
                    self.loss,
                    self.ddp,
                    images[chunk],
                    None if labels is None else labels[chunk],
                    generator,
                    slice(first + chunk.start, first + chunk.stop),
                    s.batch,
                    dtype=PRECISIONS[s.precision],
                )
                # DDP averages over processes: the sum over this one's share, over that share, is the global mean
                self.scaler.scale(losses.sum() / len(images)).backward()
            total += losses.detach().sum()
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.settings.precision != "fp16":  # the scaler has to see the infinities
            for grad in grads:
                torch.nan_to_num(grad, nan=0, posinf=1e5, neginf=-1e5, out=grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        update_ema(self.ema, self.net, ema_beta(s.batch, seen, s.ema_halflife_kimg * 1000, s.ema_rampup_ratio))
        return total / len(images), norm

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> None:
        """Train to the end of settings.kimg; calls `report` on rank 0 after each logged step.

        Raises:
            SignFastError: the loss is not finite, an image cannot be read, or a result cannot be written.
        """
        s = self.settings
        loader = BatchLoader(
            self.dataset, s.batch, s.seed, s.kwargs.get("label_dim", 0), s.xflip, self.rank, self.world, s.threads
        )
        with raised_together(self.device):
            log = RunLog(self.folder, {"metrics": COLUMNS}, self.iteration) if self.rank == 0 else None
        self.log_note = log.without_tensorboard if log is not None else ""
        self.net.train()
        before, at = time.perf_counter(), self.iteration
        batches = loader.batches(self.iteration)
        try:
            while self.iteration < s.iterations:
                images, labels = next(batches)
                images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                loss, norm = self._step(images, None if labels is None else labels.to(self.device, non_blocking=True))
                self.iteration += 1
                done = self.iteration == s.iterations
                if self.iteration % s.log_every == 0 or done:
                    if self.world > 1:
                        dist.all_reduce(loss)
                        loss = loss / self.world
                    now = time.perf_counter()
                    values = {
                        "kimg": self.iteration * s.batch / 1000,
                        "loss": float(loss),
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "grad_norm": float(norm),
                        "images_per_second": (self.iteration - at) * s.batch / (now - before),
                    }
                    before, at = now, self.iteration
                    with raised_together(self.device):
                        if not math.isfinite(values["loss"]):
                            kept = f"; {self.folder} keeps the last saved state" if saved_states(self.folder) else ""
                            raise SignFastError(
                                f"the loss is {values['loss']} at iteration {self.iteration}: lower --lr or use "
                                f"--precision fp32{kept}"
                            )
                        if log is not None:
                            log.write(self.iteration, values)
                    if log is not None:
                        report(Progress(self.iteration, s.iterations, values))
                if self.iteration % s.save_every == 0 or done:
                    with raised_together(self.device):
                        self.save()
        finally:
            batches.close()  # type: ignore[attr-defined]
            if log is not None:
                log.close()
            self.close()

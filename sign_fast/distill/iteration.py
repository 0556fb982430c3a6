"""One iteration of a distillation: the updates of fake score and student, alternating or combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SignFastError
from ..models.precond import Precond
from ..models.unet_block import UNetBlock
from ..training.ema import average_weights, ema_beta
from ..training.processes import place
from ..training.schedule import learning_rate_factor
from ..training.seeds import seed_of
from .capture import CapturedUpdates
from .draws import Draws
from .method import Losses, Method, Step
from .networks import Networks
from .parallel import average, full_state, load_full_state, local, reducing, shard
from .precision import set_precision
from .run_settings import RunSettings
from .settings import DistillSettings
from .sid import SidMethod
from .sida import SidaMethod
from .sign import SignMethod
from .trained import Trained

_CALL, _DROPOUT = 11, 12  # streams of host and dropout random numbers
METHODS: dict[str, type[SidMethod] | type[SidaMethod] | type[SignMethod]] = {
    "sid": SidMethod,
    "sida": SidaMethod,
    "sign": SignMethod,
}


class RunNetworks(Protocol):
    """What an iteration changes: see `networks.Networks`."""

    @property
    def fake(self) -> nn.Module: ...

    @property
    def student(self) -> nn.Module: ...

    @property
    def ema(self) -> nn.Module: ...

    @property
    def frozen(self) -> nn.Module | None: ...


class Updates:
    """The networks of any method with their optimizers, and how an iteration changes them.

    Args:
        settings: of the run.
        networks: as they are trained: on their device, in their precision, in shards if they are to be.
        method: its losses.
        student_scale: factor lsg of the student's loss.
        device: of the run.
        captures: the whole iteration as one CUDA graph.
        adapters: the fake score is a frozen network with adapters: parameters of these names are trained and saved.
    """

    def __init__(
        self,
        settings: RunSettings,
        networks: RunNetworks,
        method: Method,
        student_scale: float,
        device: torch.device,
        captures: bool = False,
        adapters: str | None = None,
    ) -> None:
        s = settings
        self._settings, self._networks = settings, networks
        self.method = method
        self.device = device
        self.rank, self.world = place()
        share = self.world / s.batch  # the average over processes of the sums over their samples is the whole mean
        common: dict[str, Any] = {"eps": s.eps, "loss_scaling": s.precision == "fp16", "capturable": captures}
        fake_lr, fake_betas = s.fake_lr or s.lr, s.fake_betas or s.betas
        fake_scale = s.fake_scale * share
        self.fake = Trained(
            networks.fake, fake_scale, fake_lr, fake_betas, clip=method.clip, adapters=adapters, **common
        )
        self.student = Trained(networks.student, student_scale * share, s.lr, s.betas, **common)
        self.idem = torch.ones((), device=self.device)
        self.graphs = CapturedUpdates(self.device, self.update) if captures else None
        # buffers are constants of the layers: what is averaged and copied are the parameters
        self._student, self._averaged = list(networks.student.parameters()), list(networks.ema.parameters())
        self._frozen = [] if networks.frozen is None else list(networks.frozen.parameters())

    def call_at(self, number: int) -> int:
        """Which call of the student iteration `number` trains, 1 … K, the same on all processes."""
        s = self._settings
        return 1 + int(np.random.default_rng([s.seed, _CALL, number]).integers(s.steps))

    def apply(self, number: int, step: Step) -> Losses:
        """Fake score, student, average.

        Args:
            number: of the iteration, from 0.
            step: this process's share of it.

        Returns:
            Means of the losses over this process's samples, and gradient norms, as tensors on the device.
        """
        s = self._settings
        seen = number * s.batch
        torch.manual_seed(seed_of(s.seed, _DROPOUT, number, self.rank))
        factor = learning_rate_factor(seen, int(s.lr_rampup_kimg * 1000), int(s.kimg * 1000), s.lr_schedule)
        self.fake.set_lr((s.fake_lr or s.lr) * factor)
        self.student.set_lr(s.lr * factor)
        student_moves = not s.adversarial or seen >= s.student_kimg * 1000
        found = (self.update if self.graphs is None else self.graphs.run)(step, student_moves)
        if student_moves:
            beta = ema_beta(s.batch, seen, s.ema_halflife_kimg * 1000, s.ema_rampup_ratio)
            average_weights(local(self._averaged), local(self._student), beta)
        return found

    def update(self, whole: Step, student_moves: bool) -> Losses:
        """The updates of fake score and, if it moves, student, from what is in `whole` alone."""
        s = self._settings
        if self._frozen:
            with torch.no_grad():
                torch._foreach_copy_(local(self._frozen), local(self._student))
        found: Losses = {}
        combined = s.combined and student_moves and s.trains_fake_score
        for repeat in range(int(combined), s.fake_updates if s.trains_fake_score else 0):
            found = self._fake_update(whole.repeated(repeat))
        if combined:
            found |= self._combined_update(whole)
        elif student_moves:
            found |= self._student_update(whole)
        return found

    def _fake_update(self, whole: Step) -> Losses:
        fake = self.fake
        fake.begin()
        found: Losses = {}
        for step in self._chunks(whole, fake):
            losses = self.method.fake_losses(fake, step)
            fake.scaled(list(losses.values())).backward()
            self._add(found, losses)
        return found | {"grad_norm_fake": fake.step()}

    def _student_update(self, whole: Step) -> Losses:
        student = self.student
        self.fake.train_weights(False)
        student.begin()
        found: Losses = {}
        whole = self._of_whole_batch(whole)
        for step in self._chunks(whole, student):
            losses = self.method.student_losses(student, step)
            student.scaled(list(losses.values())).backward()
            self._add(found, losses)
        return found | {"grad_norm_student": student.step()}

    def _combined_update(self, whole: Step) -> Losses:
        fake, student = self.fake, self.student
        fake.begin()
        student.begin()
        found: Losses = {}
        whole = self._of_whole_batch(whole)
        for step in self._chunks(whole, fake, student):
            self._add(found, self.method.combined_backward(fake, student, step))
        return found | {"grad_norm_fake": fake.step(), "grad_norm_student": student.step()}

    def _of_whole_batch(self, whole: Step) -> Step:
        """With what a loss of a chunk needs of the others."""
        return whole

    def _draws(self, number: int) -> Draws:
        batch = Draws.seeds_at(self._settings.seed, number, 0, self._settings.batch, self.device)
        whole = Draws(batch)
        if self.world == 1:
            return whole
        share = self._settings.batch // self.world
        return whole.part(slice(self.rank * share, (self.rank + 1) * share))

    def _chunks(self, whole: Step, *trained: Trained) -> Iterator[Step]:
        """The parts of this process's share, every n-th sample each: over all processes they are the same sets."""
        parts = self._settings.accumulation
        if parts == 1:
            yield whole
            return

        for i in range(parts):
            with reducing([net.call for net in trained], i == parts - 1):
                yield whole.part(slice(i, None, parts))

    def _add(self, found: Losses, losses: Losses) -> None:
        for name, loss in losses.items():
            mean = loss.detach().mean() / self._settings.accumulation
            found[name] = found[name] + mean if name in found else mean

    # ---- states ----

    def state(self) -> dict[str, Any]:
        """All that a run goes on from but its iteration; whole on the first process, any number can go on from it.

        All processes call it.
        """
        return {
            "fake": self.fake.state(),
            "student": self.student.state(),
            "ema": full_state(self._networks.ema),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`'s. All processes call it with the same."""
        self.fake.load_state(state["fake"])
        self.student.load_state(state["student"])
        load_full_state(self._networks.ema, state["ema"])
        if self.graphs is not None:
            self.graphs.clear()  # the optimizers' state has moved


class Iteration(Updates):
    """`Updates` of networks of `sign_fast.models`.

    Args:
        settings: of the run.
        networks: changed as precision, parallelism and checkpointing ask for. On the device of the run; for FSDP2 they
            may be on the CPU, and go to the device in shards.
        device: None takes that of the networks.
    """

    def __init__(self, settings: DistillSettings, networks: Networks, device: torch.device | None = None) -> None:
        self.settings, self.networks = settings, networks
        device = device or next(networks.teacher.parameters()).device
        world = place()[1]
        set_precision(networks, settings.precision)
        if settings.checkpointing:
            for net in (networks.teacher, networks.fake, networks.student, networks.frozen):
                if net is not None:
                    net.checkpoint_blocks()
        if settings.parallel == "fsdp" and world > 1:
            for net in (networks.teacher, networks.fake, networks.student, networks.ema, networks.frozen):
                if net is not None:
                    shard(net, device)
        method = METHODS[settings.method](settings, networks)
        captures = _captures(settings, networks, device, world)
        super().__init__(settings, networks, method, settings.student_scale, device, captures)

    def run(
        self,
        number: int,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        pairs: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Losses:
        """Fake score, student, average.

        Args:
            number: of the iteration, from 0.
            images, labels: this process's share of the real images, where the method needs them.
            pairs: its share of the teacher's (z, y, labels).

        Returns:
            Means of the losses over this process's samples, and gradient norms, as tensors on the device.
        """
        s = self.settings
        seen = number * s.batch
        self.idem.fill_(min(1.0, seen / (s.idem_ramp_kimg * 1000)) if s.idem_ramp_kimg else 1.0)
        step = Step(
            self._draws(number),
            self.call_at(number),
            images,
            labels,
            idem=self.idem,
            adversarial=seen >= s.adversarial_kimg * 1000,
            pairs=pairs,
        )
        return self.apply(number, step)

    def _of_whole_batch(self, whole: Step) -> Step:
        """With what SiDA's loss of a chunk needs of the others, for which a batch in parts takes passes of its own."""
        if self.settings.accumulation == 1 or not (whole.adversarial and isinstance(self.method, SidaMethod)):
            return whole
        means = [self.method.closeness(step) for step in self._chunks(whole)]
        return dataclasses.replace(whole, closeness=average(torch.stack(means).mean()))


def _captures(settings: DistillSettings, networks: Networks, device: torch.device, world: int) -> bool:
    """Whether iterations become CUDA graphs.

    Raises:
        SignFastError: they were to, and cannot.
    """
    reason = None
    if device.type != "cuda":
        reason = f"there are no CUDA graphs on {device.type}"
    elif world > 1:
        reason = "several processes wait for each other, which is not captured"
    elif settings.checkpointing and _drops(networks.student):
        reason = "checkpointing saves the state of dropout's random numbers: use --dropout 0"
    if settings.capture and reason:
        raise SignFastError(f"the iteration cannot be a CUDA graph: {reason}, or leave capture away")
    return reason is None and settings.capture is not False


def _drops(net: Precond) -> bool:
    return any(isinstance(module, UNetBlock) and module.dropout > 0 for module in net.modules())

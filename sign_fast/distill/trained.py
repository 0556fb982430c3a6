"""A network in training: its weights, optimizer and loss scaling, and how a gradient becomes a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .parallel import (
    full_optimizer_state,
    full_state,
    is_sharded,
    load_full_optimizer_state,
    load_full_state,
    local,
    total_norm,
    wrap,
)


class Trained:
    """Fake score or student, called as training calls it: inside DDP where there are several processes.

    Args:
        net: on its device, sharded if it is to be.
        factor: of the sum of its losses over this process's samples.
        lr, betas, eps: of Adam.
        clip: limit of each gradient value, or None.
        loss_scaling: for float16; a step with a gradient that is not finite is left away then.
        capturable: the learning rate is a tensor, so that a CUDA graph may contain the step.
        adapters: train and save only parameters with this in their name; the others stay as they are given.
    """

    def __init__(
        self,
        net: nn.Module,
        factor: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        clip: float | None = None,
        loss_scaling: bool = False,
        capturable: bool = False,
        adapters: str | None = None,
    ) -> None:
        self.net = net
        self.factor = factor
        self.clip = clip
        self.adapters = adapters
        # augmentation labels are never given: their projection gets no gradient, for which DDP would wait
        for name, p in net.named_parameters():
            p.requires_grad_("map_augment" not in name if adapters is None else adapters in name)
        self.weights = [p for p in net.parameters() if p.requires_grad]
        self.sharded = is_sharded(net)
        device = self.weights[0].device
        rate = torch.tensor(lr, device=device) if capturable else lr
        self.optimizer = torch.optim.Adam(
            self.weights,
            lr=rate,
            betas=(float(betas[0]), float(betas[1])),
            eps=eps,
            fused=device.type != "meta",  # where only shapes are computed
            capturable=capturable,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.call = wrap(net)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def lr(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Of the next step, rounded as a graph's tensor rounds it."""
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = float(np.float32(lr))

    def begin(self) -> None:
        """Forget the gradients, and want new ones."""
        self.train_weights(True)
        self.optimizer.zero_grad()

    def train_weights(self, wanted: bool) -> None:
        """Whether backward passes make gradients of the weights."""
        if self.weights[0].requires_grad != wanted:
            for p in self.weights:
                p.requires_grad_(wanted)

    def scaled(self, losses: Sequence[Tensor]) -> Tensor:
        """The total of per-sample losses as its backward pass wants it, loss scaling included."""
        return self.scaler.scale(torch.stack([loss.sum() for loss in losses]).sum() * self.factor)

    def step(self) -> Tensor:
        """Make the gradients finite and step.

        Returns:
            Their norm before, of the clipped ones where there is a limit.
        """
        self.scaler.unscale_(self.optimizer)
        grads = local([p.grad for p in self.weights if p.grad is not None])
        if self.clip is not None:
            torch._foreach_clamp_min_(grads, -self.clip)
            torch._foreach_clamp_max_(grads, self.clip)
        norm = total_norm(grads, self.sharded)
        if not self.scaler.is_enabled():  # loss scaling has to see them, and leaves the step away
            for grad in grads:
                torch.nan_to_num(grad, nan=0, posinf=1e5, neginf=-1e5, out=grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def state(self) -> dict[str, Any]:
        """Of weights, optimizer and loss scaling, see `parallel.full_state`. All processes call it."""
        return {
            "net": full_state(self.net, self.adapters),
            "optimizer": full_optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`'s. All processes call it."""
        load_full_state(self.net, state["net"], self.adapters)
        load_full_optimizer_state(self.optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

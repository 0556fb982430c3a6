"""The distillation losses: one after the other by autograd, and both with their gradients at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Direction, Inputs, Outputs
from sign_fast import functional
from sign_fast.kernels.device import Device
from sign_fast.kernels.distill_loss.op import launches_backward, launches_forward, launches_gradients
from sign_fast.kernels.launch import Launch

# CIFAR-10, the 64 × 64 sets, Stable Diffusion's latents at 512 and 1024 pixels
SIZES = ((3, 32), (3, 64), (4, 64), (4, 128))
ALPHA = 1.2
Form = Literal["sid", "fake", "matching", "both", "gradients"]


@dataclass(frozen=True)
class LossCase(Case):
    """`both`: student's and fake score's by autograd; `gradients`: these and all their gradients, forward only."""

    form: Form
    channels: int
    size: int
    operation: ClassVar[str] = "distill_loss"
    activations: ClassVar[frozenset[str]] = frozenset(
        ("images", "y_real", "y_fake", "d_images", "d_real", "d_fake", "d_fake_error")
    )

    @property
    def directions(self) -> tuple[Direction, ...]:  # type: ignore[override]
        return ("forward",) if self.form == "gradients" else ("forward", "backward")

    @property
    def shape(self) -> str:
        return f"{self.form} {self.channels}@{self.size}"

    @property
    def wide(self) -> bool:
        return self.channels * self.size**2 * self.itemsize % 16 == 0

    def _plane(self, device: str) -> Tensor:
        return torch.empty((self.batch, self.channels, self.size, self.size), dtype=self.torch_dtype, device=device)

    def launches(self, direction: Direction, device: Device) -> list[Launch]:
        x, y_real, y_fake = (self._plane("meta") for _ in range(3))
        student, fake, weight = (torch.empty(self.batch, device="meta") for _ in range(3))
        factors = torch.empty((2, self.batch), device="meta")
        fake_weight = None if self.form in ("sid", "matching") else weight
        mode: Literal["sid", "fake", "matching"] = "sid" if self.form in ("both", "gradients") else self.form  # type: ignore[assignment]
        if self.form == "gradients":
            outputs = (x, y_real, y_fake, y_fake)
            return launches_gradients(
                x, y_real, y_fake, student, fake, factors, outputs, ALPHA, None, fake_weight, 1.0, 1.0, mode, device
            )
        found = launches_forward(x, y_real, y_fake, student, fake, factors, ALPHA, None, fake_weight, mode, device)
        if direction == "backward":
            outputs = (x, y_real if mode == "sid" else None, None if mode == "matching" else y_fake, None)
            found += launches_backward(
                x, y_real, y_fake, factors, student, fake, fake_weight, outputs, ALPHA, mode, device
            )
        return found

    def inputs(self, device: str) -> Inputs:
        found = {name: self._plane(device).normal_().requires_grad_() for name in ("images", "y_real", "y_fake")}
        if self.form == "matching":
            found |= {name: found[name].detach() for name in ("y_real", "y_fake")}
        if self.form == "fake":
            del found["y_real"]
        return {**found, "sigma": torch.linspace(0.05, 5, self.batch, device=device)}

    def ours(self, inputs: Inputs) -> Outputs:
        t = inputs
        if self.form == "fake":
            return (functional.fake_score_loss(t["y_fake"], t["images"], t["sigma"]),)
        three = (t["images"], t["y_real"], t["y_fake"])
        if self.form == "sid":
            return (functional.sid_generator_loss(*three, ALPHA),)
        if self.form == "matching":
            return (functional.distribution_matching_loss(*three),)
        if self.form == "both":
            return functional.distill_losses(*three, t["sigma"], ALPHA)
        return functional.distill_loss_gradients(*three, t["sigma"], ALPHA)

    def eager(self, inputs: Inputs) -> Outputs:
        """As the published loops write it, but that they synchronise with the host to look for NaN."""
        if self.form == "gradients":
            leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in inputs.items()}
            three = [leaves[name] for name in ("images", "y_real", "y_fake")]
            with torch.enable_grad():
                student, fake = self._student(leaves), self._fake(leaves)
                found = torch.autograd.grad(student.sum(), three, retain_graph=True)
                (d_error,) = torch.autograd.grad(fake.sum(), three[2])
            return (student.detach(), fake.detach(), *found, d_error)
        if self.form == "fake":
            return (self._fake(inputs),)
        if self.form == "both":
            return self._student(inputs), self._fake(inputs)
        return (self._student(inputs),)

    def _student(self, t: Inputs) -> Tensor:
        x, real, fake = (t[name].float() for name in ("images", "y_real", "y_fake"))
        kept = ~(x.isnan() | real.isnan() | fake.isnan()).flatten(1).any(1)
        x, real, fake = (torch.where(kept[:, None, None, None], v, 0) for v in (x, real, fake))
        omega = (x - real).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        if self.form == "matching":
            direction = ((fake - real) / omega).detach()
            return (0.5 * (x - (x - direction).detach()) ** 2).sum(dim=(1, 2, 3))
        return ((real - fake) * ((real - x) - ALPHA * (real - fake)) / omega).sum(dim=(1, 2, 3))

    def _fake(self, t: Inputs) -> Tensor:
        x, fake = t["images"].float(), t["y_fake"].float()
        if self.form != "fake":
            x = x.detach()
        kept = ~(x.isnan() | fake.isnan()).flatten(1).any(1)
        x, fake = (torch.where(kept[:, None, None, None], v, 0) for v in (x, fake))
        weight = (t["sigma"] ** 2 + 0.25) / (t["sigma"] * 0.5) ** 2
        return (weight[:, None, None, None] * (fake - x) ** 2).sum(dim=(1, 2, 3))

    def bytes(self, direction: Direction) -> int:
        plane = self.batch * self.channels * self.size**2 * self.itemsize
        reads = 2 if self.form == "fake" else 3
        if self.form == "gradients":
            return 7 * plane
        writes = {"sid": 3, "both": 3, "fake": 2, "matching": 1}[self.form]
        return plane * (reads if direction == "forward" else reads + writes)


def cases(batches: Sequence[int], dtypes: Sequence[str], every: bool) -> list[Case]:
    forms: tuple[Form, ...] = ("gradients", "both", "sid", "fake", "matching")
    return [
        LossCase(batch, dtype, form, *size) for form in forms for size in SIZES for batch in batches for dtype in dtypes
    ]


def small_cases() -> list[Case]:
    return [
        LossCase(2, "float32", "gradients", 3, 32),
        LossCase(2, "bfloat16", "both", 3, 64),  # several spans a sample
        LossCase(2, "bfloat16", "gradients", 4, 64),
        LossCase(3, "float32", "fake", 1, 5),
        LossCase(3, "float16", "matching", 3, 7),
    ]


def cpu_cases() -> list[Case]:
    forms: tuple[Form, ...] = ("both", "gradients")
    return [LossCase(16, "float32", form, *size) for form in forms for size in SIZES]

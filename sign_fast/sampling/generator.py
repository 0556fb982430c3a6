"""`ImageGenerator`: seeds in, uint8 images out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..errors import SignFastError
from ..models.precond import Precond
from .ablation import ablation_sampler
from .edm import edm_sampler
from .noise import SeededNoise
from .students import few_step, one_step

Sampler = Callable[..., Tensor]

DEFAULT_STEPS = {"teacher": 18, "student": 1}


class ImageGenerator:
    """Generates images with a network; image i depends on its seed alone, up to rounding.

    Args:
        net: a preconditioned network, teacher or student.
        role: "teacher" (many steps, Heun) or "student" (one to four calls).

    Raises:
        SignFastError: an unknown role.
    """

    def __init__(self, net: Precond, role: str = "student") -> None:
        if role not in DEFAULT_STEPS:
            raise SignFastError(f"role must be teacher or student, not {role!r}")
        self.net = net.eval()
        self.role = role

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> ImageGenerator:
        """A generator with the network of a folder or a bundled name.

        Args:
            path_or_name, device: as in `sign_fast.models.load`.
            dtype: of the inner network: float32 (None), bfloat16 or float16.

        Raises:
            SignFastError: the network cannot be loaded; one line saying why.
        """
        from ..checkpoints.store import find, read_config
        from ..models import load

        net = load(path_or_name, device)
        net.dtype = dtype if dtype is not None else net.dtype
        return cls(net, read_config(find(path_or_name)).get("role", "student"))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def one_hot(self, labels: int | Sequence[int] | Tensor | None, noise: SeededNoise, count: int) -> Tensor | None:
        """(count, label_dim) rows from class numbers, drawn from the seeds where labels is None.

        Raises:
            SignFastError: labels on an unconditional network, a label out of range, or not one label an image.
        """
        dim = self.net.label_dim
        if dim == 0:
            if labels is not None:
                raise SignFastError("this network is unconditional: leave the class labels away")
            return None
        if labels is None:
            numbers = noise.randint(dim, size=[count]).to(self.device)
        else:
            wanted = torch.as_tensor(labels).reshape(-1).tolist()
            if len(wanted) not in (1, count):
                raise SignFastError(f"{len(wanted)} class labels for {count} images: give one, or one an image")
            for number in wanted:
                if int(number) != number or not 0 <= number < dim:
                    raise SignFastError(
                        f"class label {number} is out of range: this network has classes 0 to {dim - 1}"
                    )
            numbers = torch.tensor(wanted, dtype=torch.int64).expand(count).to(self.device)
        return torch.nn.functional.one_hot(numbers, dim).float()

    def images(
        self,
        seeds: Iterable[int],
        steps: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        sampler: str | Sampler | None = None,
        **options: Any,
    ) -> Tensor:
        """As `__call__`, but (B, C, H, W) floats in about [-1, 1]."""
        seeds = list(seeds)
        if not seeds:
            raise SignFastError("no seeds: give at least one")
        steps = DEFAULT_STEPS[self.role] if steps is None else steps
        if steps < 1:
            raise SignFastError(f"steps must be at least 1, not {steps}")
        noise = SeededNoise(self.device, seeds)
        net = self.net
        latents = noise.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution])
        class_labels = self.one_hot(labels, noise, len(seeds))
        run = self._sampler(sampler, steps)
        return run(net, latents, class_labels, noise.randn_like, num_steps=steps, **options)

    def _sampler(self, sampler: str | Sampler | None, steps: int) -> Sampler:
        if callable(sampler):
            return sampler
        if sampler is None:
            sampler = "edm" if self.role == "teacher" else "few_step"
        known: dict[str, Sampler] = {
            "edm": edm_sampler,
            "ablation": ablation_sampler,
            "one_step": _one_step,
            "few_step": few_step,
        }
        if sampler not in known:
            raise SignFastError(f"unknown sampler {sampler!r}: known: {', '.join(known)}")
        if sampler == "one_step" and steps != 1:
            raise SignFastError(f"the one_step sampler makes 1 step, not {steps}: use few_step")
        return known[sampler]

    def __call__(
        self,
        seeds: Iterable[int],
        steps: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        sampler: str | Sampler | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate one batch.

        Args:
            seeds: one an image, whole numbers, taken modulo 2³².
            steps: of the sampler; None means 1 for a student and 18 for a teacher.
            labels: a class number, or one an image; None draws them from the seeds where the network has classes.
            sampler: "edm", "ablation", "one_step", "few_step", or a function with `edm_sampler`'s first five arguments;
                None means "edm" for a teacher and "few_step" for a student.
            options: handed to the sampler, e.g. rho=7 or S_churn=40.

        Returns:
            (B, H, W, C) uint8 on the network's device.

        Raises:
            SignFastError: no seeds, steps < 1, labels that do not fit, an unknown sampler.
        """
        return functional.to_uint8(self.images(seeds, steps, labels, sampler, **options))


def _one_step(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None,
    randn_like: Callable[[Tensor], Tensor],
    num_steps: int,
    **options: Any,
) -> Tensor:
    return one_step(net, latents, class_labels, **options)

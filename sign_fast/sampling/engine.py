"""Generates batches with a network: noise of the seeds, the sampler, the conversion to bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import SignFastError
from .noise import SeededNoise
from .requests import DENOISER_SAMPLERS, Output, Sampler, check_choices, is_time_free
from .students import multistep, one_step, recursive


class Engine:
    """A network ready to generate.

    Args:
        net: a denoiser net(x, sigma, class_labels) or a student without a time input, net(x, class_labels).
        dtype: of the inner network: float32, bfloat16 or float16; None keeps its own.
        consume: the network is not used elsewhere, so that its weights may be changed in place.
        noise: "torch" (the published generators, one a seed) or "philox".
        max_graphs: CUDA graphs kept.

    Raises:
        SignFastError: an unknown noise or dtype, a dtype for a network that takes none, or a network that does not
            say the shape of its images.
    """

    def __init__(
        self, net: Any, *, dtype: torch.dtype | None = None, consume: bool = False, noise: str = "torch",
        max_graphs: int = 16,
    ) -> None:  # fmt: skip
        check_choices(dtype, noise)
        if lacks := [name for name in ("img_resolution", "img_channels") if not hasattr(net, name)]:
            raise SignFastError(f"the network does not say its {' and '.join(lacks)}: set them as attributes")
        if dtype is not None:
            if not hasattr(net, "dtype"):
                raise SignFastError("this network takes no dtype: leave it away, or use one of sign_fast.models")
            net = copy.copy(net)  # shares the weights; the caller's network keeps its dtype
            net.dtype = dtype
        self._net = net.eval() if isinstance(net, nn.Module) else net
        self._noise = noise
        self.img_resolution: int = net.img_resolution
        self.img_channels: int = net.img_channels
        self.label_dim: int = getattr(net, "label_dim", 0)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        first = next(self._net.parameters(), None) if isinstance(self._net, nn.Module) else None
        return torch.device("cpu") if first is None else first.device

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        sampler: str | Sampler,
        steps: int,
        labels: Sequence[int] | None,
        output: Output = "uint8",
        **options: Any,
    ) -> Tensor:
        """Images of the seeds, in memory of their own.

        Args:
            seeds, sampler, steps, labels, options: as `requests.check_request` leaves them.
            output: "uint8" for (B, H, W, C) bytes, "float" for (B, C, H, W) float32 in about [-1, 1].
        """
        noise = (SeededNoise if self._noise == "torch" else _PhiloxNoise)(self.device, seeds)
        latents = noise.randn([len(seeds), self.img_channels, self.img_resolution, self.img_resolution])
        one_hot = self._one_hot(noise, len(seeds), labels)
        images = self._sample(sampler, latents, one_hot, noise, steps, options)
        return functional.to_uint8(images) if output == "uint8" else images.float()

    def _one_hot(self, noise: Any, count: int, labels: Sequence[int] | None) -> Tensor | None:
        if self.label_dim == 0:
            return None
        if labels is None:
            numbers = noise.randint(self.label_dim, size=[count])
        else:
            numbers = torch.tensor(labels, dtype=torch.int64)
        return nn.functional.one_hot(numbers.to(self.device), self.label_dim).float()

    def _sample(
        self, sampler: str | Sampler, latents: Tensor, labels: Tensor | None, noise: Any, steps: int,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        net = self._net
        if is_time_free(net):

            def student(x: Tensor) -> Tensor:
                return net(x) if labels is None else net(x, labels)

            if sampler == "recursive":
                return recursive(student, latents, steps)
            if sampler == "multistep":
                return multistep(student, latents, options["noise_levels"], noise.randn_like)
        if sampler == "one_step":
            return one_step(net, latents, labels, **options)
        run = DENOISER_SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        return run(net, latents, labels, noise.randn_like, num_steps=steps, **options)


class _PhiloxNoise:
    """`functional.philox_normal` draw by draw: the latents are step 0 of a seed's streams, each draw takes the next."""

    def __init__(self, device: torch.device, seeds: Iterable[int]) -> None:
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self.step = 0

    def randn(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        noise = functional.philox_normal(self.seeds, self.step, (size[1], size[2], size[3])).to(dtype)
        self.step += 1
        return noise

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, high: int, *, size: Sequence[int]) -> Tensor:
        """Class numbers from the last of the streams: ⌊high·Φ(n)⌋."""
        n = functional.philox_normal(self.seeds, (1 << 32) - 1, (1, 1, 1), dtype=torch.float64).flatten()
        return (torch.special.ndtr(n) * high).long().clamp(max=high - 1)

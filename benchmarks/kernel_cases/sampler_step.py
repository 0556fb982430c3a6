"""The sampler's step: preconditioning with new noise, noise alone, and the bytes at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Direction, Inputs, Outputs
from sign_fast import functional
from sign_fast.kernels.device import Device
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.sampler_step import reference
from sign_fast.kernels.sampler_step.op import launches_forward, launches_noise

Form = Literal["step", "noise", "bytes"]
FORMS: tuple[Form, ...] = ("step", "noise", "bytes")
IMAGES = ((3, 32), (3, 64))  # channels, height and width
LATENTS = ((4, 64),)
STEP = 3  # which of the seeds' streams


@dataclass(frozen=True)
class SamplerCase(Case):
    """F comes in `dtype`, x is float32, as the published samplers keep it; noise alone is in `dtype`."""

    channels: int
    size: int
    form: Form
    channels_last: bool = False
    operation: ClassVar[str] = "sampler_step"
    activations: ClassVar[frozenset[str]] = frozenset(("x", "f", "y"))
    directions: ClassVar[tuple[Direction, ...]] = ("forward",)

    @property
    def shape(self) -> str:
        return f"{self.form} {self.channels}@{self.size}" + (" channels_last" if self.channels_last else "")

    @property
    def wide(self) -> bool:
        # neighbours in the images' order, which numbers the noise in C, H, W and the bytes in H, W, C, are no
        # neighbours in memory of the other order: 3 or 4 channels of a pixel lie between them, or a whole plane
        return self.channels_last == (self.form == "bytes")

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _plane(self, dtype: torch.dtype, device: str) -> Tensor:
        shape = (self.batch, self.channels, self.size, self.size)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=self._layout)

    def _tensors(self, device: str) -> Inputs:
        """All arguments by name, without values."""
        found = {}
        if self.form != "noise":
            found = {"x": self._plane(torch.float32, device), "f": self._plane(self.torch_dtype, device)}
            found |= {name: torch.empty(self.batch, device=device) for name in ("c_skip", "c_out")}
        if self.form != "bytes":
            found["seeds"] = torch.empty(self.batch, dtype=torch.int64, device=device)
        if self.form == "step":
            found |= {name: torch.empty(self.batch, device=device) for name in ("scale", "sigma")}
        return found

    def launches(self, direction: Direction, device: Device) -> list[Launch]:
        t = self._tensors("meta")
        if self.form == "noise":
            return launches_noise(t["seeds"], STEP, self._plane(self.torch_dtype, "meta"), 1.0, device)
        arguments = (t["c_skip"], t["c_out"], device)
        if self.form == "bytes":
            y = torch.empty((self.batch, self.size, self.size, self.channels), dtype=torch.uint8, device="meta")
            return launches_forward(t["x"], t["f"], y, *arguments)
        noise = {name: t[name] for name in ("seeds", "scale", "sigma")}
        return launches_forward(t["x"], t["f"], self._plane(torch.float32, "meta"), *arguments, step=STEP, **noise)

    def inputs(self, device: str) -> Inputs:
        found = self._tensors(device)
        for name, t in found.items():
            if name == "seeds":
                t.random_()
            elif name in ("x", "f"):
                t.normal_()
            else:
                t.uniform_(0.25, 0.75)
        return found

    def ours(self, inputs: Inputs) -> Outputs:
        t = inputs
        if self.form == "noise":
            shape = (self.channels, self.size, self.size)
            noise = functional.philox_normal(
                t["seeds"], STEP, shape, dtype=self.torch_dtype, memory_format=self._layout
            )
            return (noise,)
        arguments = (t["x"], t["f"], t["c_skip"], t["c_out"])
        if self.form == "bytes":
            return (functional.to_uint8(*arguments),)
        noise = {name: t[name] for name in ("seeds", "scale", "sigma")}
        return (functional.sampler_step(*arguments, step=STEP, **noise),)

    def _plain(self, inputs: Inputs, noise: Tensor | None) -> Outputs:
        if self.form == "noise":
            assert noise is not None
            return (noise,)
        t = {name: value[:, None, None, None] if value.ndim == 1 else value for name, value in inputs.items()}
        d = t["c_skip"] * t["x"] + t["c_out"] * t["f"].to(torch.float32)
        if noise is not None:
            return (t["scale"] * d + t["sigma"] * noise,)
        return ((d * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(),)

    @property
    def _noise_dtype(self) -> torch.dtype:
        return self.torch_dtype if self.form == "noise" else torch.float32

    def eager(self, inputs: Inputs) -> Outputs:
        """With torch's own random numbers, one generator for the batch."""
        if self.form == "bytes":
            return self._plain(inputs, None)
        noise = self._plane(self._noise_dtype, inputs["seeds"].device.type)
        if noise.is_cpu and self.channels_last:  # there a copy is far faster than normal_(), which goes one by one
            return self._plain(inputs, noise.copy_(torch.randn(noise.shape, dtype=noise.dtype)))
        return self._plain(inputs, noise.normal_())

    def expected(self, inputs: Inputs) -> Outputs:
        if self.form == "bytes":
            return self._plain(inputs, None)
        shape = (self.channels, self.size, self.size)
        noise = reference.philox_normal(inputs["seeds"], STEP, shape, 1.0, torch.float64, self.channels_last)
        return self._plain(inputs, noise.to(self._noise_dtype))

    def bytes(self, direction: Direction) -> int:
        elements = self.batch * self.channels * self.size**2
        if self.form == "noise":
            return elements * self.itemsize
        return elements * (4 + self.itemsize + (1 if self.form == "bytes" else 4))


def cases(batches: Sequence[int], dtypes: Sequence[str], every: bool) -> list[Case]:
    wanted = [(image, form) for image in IMAGES for form in FORMS]
    # latents are decoded before they become bytes
    wanted += [(latent, form) for latent in LATENTS for form in FORMS if every or form != "bytes"]
    return [
        SamplerCase(batch, dtype, *image, form, channels_last)
        for image, form in wanted
        for channels_last in (False, True)
        for batch in batches
        for dtype in dtypes
    ]


def small_cases() -> list[Case]:
    return [
        SamplerCase(2, "bfloat16", 3, 16, "step"),
        SamplerCase(3, "float32", 3, 7, "step", True),  # nothing divides by anything
        SamplerCase(2, "float16", 4, 8, "noise", True),
        SamplerCase(3, "float32", 3, 5, "noise"),
        SamplerCase(2, "bfloat16", 3, 16, "bytes", True),
        SamplerCase(3, "float32", 3, 7, "bytes"),
    ]


def cpu_cases() -> list[Case]:
    return [SamplerCase(16, "float32", 3, 32, form, last) for form in FORMS for last in (False, True)]

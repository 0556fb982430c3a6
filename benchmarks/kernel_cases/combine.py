"""What a sampler sums between two network calls: a few-step sampler's next state, the second half of a Heun step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Direction, Inputs, Outputs
from sign_fast import functional
from sign_fast.kernels.combine.op import launches_forward
from sign_fast.kernels.device import Device
from sign_fast.kernels.launch import Launch

Form = Literal["few_step", "heun"]
# which states the network has made; the others are the sampler's own and its noise
STATES: dict[Form, tuple[bool, ...]] = {
    "few_step": (True, False),  # D and noise
    "heun": (False, True, False, True, False),  # x, D, Euler's x, its D, and the next step's noise
}
IMAGES = ((3, 32), (3, 64))  # channels, height and width
LATENTS = ((4, 64),)


@dataclass(frozen=True)
class CombineCase(Case):
    """The network's outputs come in `dtype`; states, noise and result are float64, as in the published samplers."""

    channels: int
    size: int
    form: Form
    channels_last: bool = False
    operation: ClassVar[str] = "combine"
    activations: ClassVar[frozenset[str]] = frozenset(("y", *(f"x{j}" for j in range(8))))
    directions: ClassVar[tuple[Direction, ...]] = ("forward",)

    @property
    def shape(self) -> str:
        return f"{self.form} {self.channels}@{self.size}" + (" channels_last" if self.channels_last else "")

    def _plane(self, dtype: torch.dtype, device: str) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (self.batch, self.channels, self.size, self.size)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)

    def _states(self, device: str) -> list[Tensor]:
        dtypes = [self.torch_dtype if by_network else torch.float64 for by_network in STATES[self.form]]
        return [self._plane(dtype, device) for dtype in dtypes]

    def launches(self, direction: Direction, device: Device) -> list[Launch]:
        states = self._states("meta")
        coefficients = torch.empty(len(states), dtype=torch.float64, device="meta")
        return launches_forward(states, coefficients, self._plane(torch.float64, "meta"), device)

    def inputs(self, device: str) -> Inputs:
        states = self._states(device)
        found = {f"x{j}": state.normal_() for j, state in enumerate(states)}
        return {**found, "coefficients": torch.rand(len(states), dtype=torch.float64, device=device)}

    def _split(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        return [t for name, t in inputs.items() if name != "coefficients"], inputs["coefficients"]

    def ours(self, inputs: Inputs) -> Outputs:
        states, coefficients = self._split(inputs)
        return (functional.combine(states, coefficients, torch.float64),)

    def eager(self, inputs: Inputs) -> Outputs:
        states, coefficients = self._split(inputs)
        first, *others = (state.to(torch.float64) * c for state, c in zip(states, coefficients.unbind(), strict=True))
        return (sum(others, first),)

    def bytes(self, direction: Direction) -> int:
        moved = [self.itemsize if by_network else 8 for by_network in STATES[self.form]]
        return self.batch * self.channels * self.size**2 * (sum(moved) + 8)


def cases(batches: Sequence[int], dtypes: Sequence[str], every: bool) -> list[Case]:
    return [
        CombineCase(batch, dtype, *image, form)
        for image in (*IMAGES, *LATENTS)
        for form in STATES
        for batch in batches
        for dtype in dtypes
    ]


def small_cases() -> list[Case]:
    return [
        CombineCase(2, "bfloat16", 3, 16, "few_step"),
        CombineCase(3, "float32", 3, 7, "few_step", True),  # nothing divides by anything
        CombineCase(2, "float16", 4, 8, "heun", True),
        CombineCase(3, "float32", 3, 5, "heun"),
    ]


def cpu_cases() -> list[Case]:
    return [CombineCase(16, "float32", 3, 32, form) for form in STATES]

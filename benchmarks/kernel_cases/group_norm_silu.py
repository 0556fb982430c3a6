"""GroupNorm–SiLU, with what each published network folds into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases import Case, Direction, Inputs, Outputs
from benchmarks.official_shapes import Norm, calls, latent_norms, official
from sign_fast import functional
from sign_fast.kernels.device import Device
from sign_fast.kernels.group_norm_silu.op import launches_backward, launches_forward, launches_parameter_gradients
from sign_fast.kernels.launch import Launch

EPS = 1e-5
SKIP_SCALE = 0.5**0.5


@dataclass(frozen=True)
class NormCase(Case):
    norm: Norm
    operation: ClassVar[str] = "group_norm_silu"
    activations: ClassVar[frozenset[str]] = frozenset(("x", "x2", "skip", "r", "y", "dy", "stream", "dx", "dx2"))

    @property
    def shape(self) -> str:
        words = "+".join(map(str, self.norm.parts)) + f"@{self.norm.size}"
        return " ".join(filter(None, (words, self.norm.folds, "" if self.norm.silu else "plain")))

    @property
    def joins(self) -> bool:
        return "skip" in self.norm.folds.split()

    @property
    def wide(self) -> bool:
        return all(channels * self.itemsize % 16 == 0 for channels in self.norm.parts)

    def _plane(self, channels: int, device: str) -> Tensor:
        size = self.norm.size
        t = torch.empty((self.batch, channels, size, size), dtype=self.torch_dtype, device=device)
        return t.contiguous(memory_format=torch.channels_last)

    def _tensors(self, device: str) -> Inputs:
        """All arguments by name, without values."""
        found = {name: self._plane(c, device) for name, c in zip(("x", "x2"), self.norm.parts, strict=False)}
        channels = self.norm.channels
        for name in ("weight", "bias", *self.norm.folds.split()):
            if name == "skip":
                found[name] = self._plane(channels, device)
            else:
                shape = (channels,) if name.endswith(("weight", "bias")) else (self.batch, channels)
                found[name] = torch.empty(shape, dtype=self.torch_dtype, device=device)
        return found

    def launches(self, direction: Direction, device: Device) -> list[Launch]:
        t, norm = self._tensors("meta"), self.norm
        x, x2, y = t["x"], t.get("x2"), self._plane(norm.channels, "meta")
        rows = {name: t.get(name) for name in ("emb", "input_bias", "scale", "shift")}
        join = {}
        if self.joins:
            join = {"skip": t["skip"], "join_bias": t.get("join_bias"), "r": y, "skip_scale": SKIP_SCALE}
        training = direction == "backward"
        stats = torch.empty((self.batch, norm.groups, 3), device="meta")
        affine = (norm.groups, t["weight"], t["bias"])
        found = launches_forward(
            x, x2, y, stats if training else None, *affine, EPS, device, silu=norm.silu, **rows, **join
        )
        if not training:
            return found
        sums = torch.empty((3, self.batch, norm.channels), device="meta")
        found += launches_backward(
            y, x, x2, x, x2, sums, stats, *affine, device, silu=norm.silu, **rows,
            stream=y if self.joins else None, skip_scale=SKIP_SCALE if self.joins else 1.0,
            input_sum=not {"emb", "input_bias", "join_bias"}.isdisjoint(t),
        )  # fmt: skip
        scale = t.get("scale")
        dscale = None if scale is None else torch.empty_like(scale, dtype=torch.float32)
        vectors = torch.empty((3, norm.channels), device="meta")
        return found + launches_parameter_gradients(sums, t["weight"], t["bias"], scale, vectors, dscale)

    def inputs(self, device: str) -> Inputs:
        return {name: t.normal_().requires_grad_() for name, t in self._tensors(device).items()}

    def ours(self, inputs: Inputs) -> Outputs:
        t, norm = inputs, self.norm
        activation = "silu" if norm.silu else None
        if self.joins:
            return functional.residual_group_norm_silu(
                t["x"], t["skip"], t.get("join_bias"), SKIP_SCALE, norm.groups, t["weight"], t["bias"], EPS,
                activation=activation,
            )  # fmt: skip
        rows = {name: t.get(name) for name in ("emb", "input_bias", "scale", "shift")}
        x = (t["x"], t["x2"]) if "x2" in t else t["x"]
        return (functional.group_norm_silu(x, norm.groups, t["weight"], t["bias"], EPS, **rows, activation=activation),)

    def eager(self, inputs: Inputs) -> Outputs:
        t = inputs
        x = torch.cat([t["x"], t["x2"]], 1) if "x2" in t else t["x"]
        stream: Outputs = ()
        if self.joins:
            x = x + t["join_bias"][:, None, None] if "join_bias" in t else x
            x = (x + t["skip"]) * SKIP_SCALE
            stream = (x,)
        x = x + t["input_bias"][:, None, None] if "input_bias" in t else x
        x = x + t["emb"][:, :, None, None] if "emb" in t else x
        y = F.group_norm(x, self.norm.groups, t["weight"], t["bias"], EPS)
        y = y * (1 + t["scale"][:, :, None, None]) if "scale" in t else y
        y = y + t["shift"][:, :, None, None] if "shift" in t else y
        return (*stream, F.silu(y) if self.norm.silu else y)

    def bytes(self, direction: Direction) -> int:
        plane = self.batch * self.norm.channels * self.norm.size**2 * self.itemsize
        # forward: x, y, with a residual sum the skip and the stream too; backward: x, dy, dx, and the stream's gradient
        return plane * (2 + 2 * self.joins if direction == "forward" else 3 + self.joins)


def cases(batches: Sequence[int], dtypes: Sequence[str], every: bool) -> list[Case]:
    norms = list(official(Norm))
    if every:
        norms += latent_norms()
        shapes = sorted({(norm.parts, norm.size, norm.groups) for norm in norms})
        norms += [Norm(*shape, "emb input_bias scale shift") for shape in shapes]
        norms += [Norm(*shape, "skip join_bias") for shape in shapes if len(shape[0]) == 1]
    return [NormCase(batch, dtype, norm) for norm in dict.fromkeys(norms) for batch in batches for dtype in dtypes]


def small_cases() -> list[Case]:
    tile = NormCase(2, "bfloat16", Norm((256,), 8, 32, "emb input_bias scale shift"))
    wide = replace(tile, dtype="float32")
    return [
        tile,
        replace(wide, norm=Norm((24, 24), 7, 6)),  # nothing divides by anything; a group lies on the seam
        replace(tile, norm=Norm((128,), 8, 32, "skip join_bias")),
        replace(wide, norm=Norm((384,), 32, 32, "scale shift")),  # more than a tile holds: spans or two walks
        replace(tile, batch=1, norm=Norm((128, 64), 64, 32)),
    ]


def cpu_cases() -> list[Case]:
    found = {(call.channels, call.size) for call in calls("cifar10-uncond-vp") if isinstance(call, Norm)}
    return [NormCase(16, "float32", Norm((channels,), size, 32)) for channels, size in sorted(found)]

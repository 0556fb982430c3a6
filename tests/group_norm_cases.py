"""GroupNorm–SiLU written out in ordinary torch, and inputs for it: what every version is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


@dataclass
class Inputs:
    """One call; tensors by the names of `functional.group_norm_silu`, x2 and join arguments beside them."""

    num_groups: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    silu: bool = True
    skip_scale: float = 1.0

    def to(self, dtype: torch.dtype | None = None, device: str | None = None, leaves: bool = False) -> Inputs:
        moved = {}
        for name, t in self.tensors.items():
            t = t.detach().to(device=device, dtype=dtype if dtype == torch.float64 else None)
            moved[name] = t.requires_grad_() if leaves else t
        return Inputs(self.num_groups, moved, self.silu, self.skip_scale)


def plain(inputs: Inputs) -> tuple[Tensor, ...]:
    """What a network would do in ordinary torch, every step in x's dtype: (y,) or (r, y) of the residual form."""
    t, dtype = inputs.tensors, inputs.tensors["x"].dtype

    def get(name: str) -> Tensor | None:
        return None if name not in t else t[name].to(dtype)

    def planes(value: Tensor) -> Tensor:
        return value.reshape(-1, value.shape[-1], 1, 1)

    x, x2, emb, input_bias, join_bias = t["x"], get("x2"), get("emb"), get("input_bias"), get("join_bias")
    if x2 is not None:
        x = torch.cat([x, x2], dim=1)
    stream = ()
    if "skip" in t:
        x = x if join_bias is None else x + planes(join_bias)
        x = (x + t["skip"]) * inputs.skip_scale
        stream = (x,)
    for row in (input_bias, emb):
        x = x if row is None else x + planes(row)
    weight, bias = get("weight"), get("bias")
    if weight is None and bias is not None:  # torch's backward fails with a bias but no weight
        weight = torch.ones_like(bias)
    y = torch.group_norm(x, inputs.num_groups, weight, bias, EPS)  # F.group_norm refuses single values
    scale, shift = get("scale"), get("shift")
    y = y if scale is None else y * (1 + planes(scale))
    y = y if shift is None else y + planes(shift)
    return (*stream, F.silu(y) if inputs.silu else y)


def fast(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same through `sign_fast.functional`."""
    from sign_fast import functional

    t, activation = inputs.tensors, "silu" if inputs.silu else None
    weight, bias = t.get("weight"), t.get("bias")
    if "skip" in t:
        return functional.residual_group_norm_silu(
            t["x"],
            t["skip"],
            t.get("join_bias"),
            inputs.skip_scale,
            inputs.num_groups,
            weight,
            bias,
            EPS,
            activation=activation,
        )
    rows = {name: t.get(name) for name in ("emb", "input_bias", "scale", "shift")}
    x = (t["x"], t["x2"]) if "x2" in t else t["x"]
    return (functional.group_norm_silu(x, inputs.num_groups, weight, bias, EPS, **rows, activation=activation),)


def make(
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = True,
    folds: str = "weight bias emb input_bias scale shift",
    second: int = 0,
    parameters: torch.dtype | None = None,
    mean: float = 1.0,
    deviation: float = 3.0,
    silu: bool = True,
    skip_scale: float = 0.70710678,
    seed: int = 0,
) -> Inputs:
    """Random inputs; `second` channels of `shape` come from a second tensor, folds names the optional ones."""
    batch, channels, height, width = shape
    g = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def plane(count: int, scale: float, offset: float) -> Tensor:
        values = torch.randn(batch, count, height, width, generator=g) * scale + offset
        return values.to(dtype).contiguous(memory_format=layout)

    t = {"x": plane(channels - second, deviation, mean)}
    if second:
        t["x2"] = plane(second, deviation, mean)
    wanted = folds.split()
    if "skip" in wanted:
        t["skip"] = plane(channels, deviation, -0.5)
    for name in ("weight", "bias", "input_bias", "join_bias"):
        if name in wanted:
            t[name] = torch.randn(channels, generator=g).to(parameters or torch.float32)
    for name in ("emb", "scale", "shift"):
        if name in wanted:
            t[name] = torch.randn(batch, channels, generator=g).to(parameters or torch.float32)
    return Inputs(num_groups, t, silu, skip_scale if "skip" in wanted else 1.0)


def gradients(
    outputs: tuple[Tensor, ...], inputs: Inputs, seed: int = 1, create_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of every tensor of `inputs` for random upstream gradients that do not depend on dtype or device."""
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=g).to(torch.bfloat16).to(y) for y in outputs]
    names = list(inputs.tensors)
    found = torch.autograd.grad(outputs, [inputs.tensors[name] for name in names], upstream, create_graph=create_graph)
    return dict(zip(names, found, strict=True))

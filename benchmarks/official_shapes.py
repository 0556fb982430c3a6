"""The calls that the published networks make, read off the networks themselves: each preset runs once without data.

On the meta device a forward pass computes shapes only, so that no list of channel counts is kept by hand.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sign_fast import functional, models
from sign_fast.models.presets import preset_names

# Stable Diffusion 1.5 and XL, whose blocks use the same norm (SPEC.md, section 1): channels, resolutions
LATENT_CHANNELS = (320, 640, 960, 1280, 1920, 2560)
LATENT_SIZES = (8, 16, 32, 64, 128)
FOLDS = ("emb", "input_bias", "scale", "shift")


@dataclass(frozen=True, order=True)
class Norm:
    """One GroupNorm of a network.

    Args:
        parts: the channels of its input, or of the two tensors that are read as concatenated.
        size: H = W.
        groups: number of groups.
        folds: the optional tensors besides weight and bias, among emb, input_bias, scale, shift; "skip" and
            "join_bias" for the residual form.
        silu: whether SiLU follows.
    """

    parts: tuple[int, ...]
    size: int
    groups: int
    folds: str = ""
    silu: bool = True

    @property
    def channels(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True, order=True)
class Attention:
    """One self-attention: heads, channels a head, tokens, and whether q, k, v alternate in the projection's rows."""

    heads: int
    dim: int
    tokens: int
    interleaved: bool = True


Call = TypeVar("Call", Norm, Attention)


def official_presets() -> list[str]:
    """The eight published configurations; the digits are this library's own."""
    return [name for name in preset_names() if not name.startswith("digits")]


@cache
def calls(preset: str) -> Counter[Norm | Attention]:
    """How often one forward pass of a preset makes each call."""
    found: Counter[Norm | Attention] = Counter()
    parts: dict[int, tuple[int, ...]] = {}
    kept: list[Tensor] = []  # so that no identity is used twice
    names = ("group_norm_silu", "residual_group_norm_silu", "projected_attention")
    real = {name: getattr(functional, name) for name in names}

    class Concatenations(TorchFunctionMode):
        """Remembers what a tensor was concatenated from."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.cat and result.ndim == 4:
                kept.append(result)
                parts[id(result)] = tuple(t.shape[1] for t in args[0])
            return result

    def group_norm_silu(x: Any, num_groups: int, *rest: Any, **named: Any) -> Tensor:
        pieces = tuple(t.shape[1] for t in x) if isinstance(x, tuple) else parts.get(id(x), (x.shape[1],))
        first = x[0] if isinstance(x, tuple) else x
        folds = " ".join(name for name in FOLDS if named.get(name) is not None)
        found[Norm(pieces, first.shape[-1], num_groups, folds, named.get("activation", "silu") == "silu")] += 1
        return real["group_norm_silu"](x, num_groups, *rest, **named)

    def residual_group_norm_silu(
        h: Tensor, skip: Tensor, bias: Any, scale: float, groups: int, *rest: Any, **named: Any
    ) -> Any:
        silu = named.get("activation", "silu") == "silu"
        folds = "skip" if bias is None else "skip join_bias"
        found[Norm((h.shape[1],), h.shape[-1], groups, folds, silu)] += 1
        return real["residual_group_norm_silu"](h, skip, bias, scale, groups, *rest, **named)

    def projected_attention(qkv: Tensor, num_heads: int, *, interleaved: bool = True) -> Tensor:
        _, channels, height, width = qkv.shape
        found[Attention(num_heads, channels // (3 * num_heads), height * width, interleaved)] += 1
        return real["projected_attention"](qkv, num_heads, interleaved=interleaved)

    replacements = (group_norm_silu, residual_group_norm_silu, projected_attention)
    with ExitStack() as stack:
        for name, replacement in zip(names, replacements, strict=True):
            stack.enter_context(patch.object(functional, name, replacement))
        stack.enter_context(Concatenations())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.no_grad())
        net = models.create(preset).eval()
        images = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution)
        net(images, torch.empty(1), torch.empty(1, net.label_dim) if net.label_dim else None)
    return found


def official(kind: type[Call]) -> dict[Call, list[str]]:
    """Every call of that kind in the published networks and the presets that make it, in a fixed order."""
    table: dict[Call, list[str]] = {}
    for preset in official_presets():
        for call in calls(preset):
            if isinstance(call, kind):
                table.setdefault(call, []).append(preset)
    return dict(sorted(table.items()))


def latent_norms() -> list[Norm]:
    """The norms of Stable Diffusion's blocks: plain and after an embedding."""
    sizes = [(c, s) for c in LATENT_CHANNELS for s in LATENT_SIZES]
    return [Norm((c,), s, 32, folds) for c, s in sizes for folds in ("", "emb")]


def latent_attentions() -> list[Attention]:
    """The self-attentions of Stable Diffusion 1.5 (8 heads) and XL (64 channels a head)."""
    small = [Attention(8, dim, tokens, False) for dim, tokens in ((40, 4096), (80, 1024), (160, 256), (160, 64))]
    return small + [Attention(heads, 64, tokens, False) for heads, tokens in ((10, 4096), (20, 1024))]

"""Which norm a block's output goes straight into, read off the order in which diffusers' blocks call their modules."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import nn

from .attention import Attention
from .joins import Follower
from .modules import FOLLOWER, GroupNorm, GroupNormSiLU, ResnetBlock2D, Transformer2DModel

# blocks that call resnets[0], attentions[0], resnets[1], … each with the output of the one before
_IN_TURN = frozenset(("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "DownEncoderBlock2D"))
_IN_TURN |= frozenset(("AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"))
# the same, but each residual block's input is joined with a skip connection's channels
_IN_TURN_WITH_SKIPS = frozenset(("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"))
# resnets[0], then attentions[0], resnets[1], …
_MIDDLE = frozenset(("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"))


def connect(model: nn.Module) -> None:
    """Tell every residual block, transformer and attention of ours in a UNet, encoder or decoder what follows it.

    A guess that does not come true costs the time of one norm: see `joins`.
    """
    before: nn.Module | None = None
    for module in _order(model):
        entry = None if module is None else _entry(module)
        if before is not None and entry is not None:
            before.__dict__[FOLLOWER] = entry
        makes = isinstance(module, ResnetBlock2D | Transformer2DModel) or (
            isinstance(module, Attention) and bool(module.residual_connection)
        )
        before = module if makes else None


def _entry(module: nn.Module) -> Follower | None:
    """The norm that a module begins with."""
    if isinstance(module, ResnetBlock2D):
        return Follower(module.norm1, True)
    if isinstance(module, Transformer2DModel) and isinstance(module.norm, GroupNorm):
        return Follower(module.norm, False)
    if isinstance(module, Attention) and isinstance(module.group_norm, GroupNorm):
        return Follower(module.group_norm, False)
    return Follower(module, True) if isinstance(module, GroupNormSiLU) else None


def _order(model: Any) -> Iterator[nn.Module | None]:
    """The modules in the order of their calls; None where something else lies between two."""
    decodes = not hasattr(model, "down_blocks")  # an autoencoder's decoder begins with the middle
    for block in () if decodes else model.down_blocks:
        yield from _block(block)
        if getattr(block, "downsamplers", None) is not None:
            yield None
    yield from _block(getattr(model, "mid_block", None))
    for block in getattr(model, "up_blocks", ()):
        yield from _block(block)
        if getattr(block, "upsamplers", None) is not None:
            yield None
    yield getattr(model, "conv_norm_out", None)


def _block(block: Any) -> Iterator[nn.Module | None]:
    name = type(block).__name__
    attentions = list(getattr(block, "attentions", ()))
    if name in _MIDDLE:
        yield block.resnets[0]
        for attention, resnet in zip(attentions, list(block.resnets)[1:], strict=False):
            if attention is not None:
                yield attention
            yield resnet
    elif name in _IN_TURN or name in _IN_TURN_WITH_SKIPS:
        for resnet, attention in zip_longest(block.resnets, attentions):
            if name in _IN_TURN_WITH_SKIPS:
                yield None
            yield resnet
            if attention is not None:
                yield attention
    else:
        yield None

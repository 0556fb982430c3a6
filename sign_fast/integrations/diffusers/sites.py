"""The places of a diffusers network that sign_fast has an operation for, what they can become and what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models import attention_processor, normalization, resnet
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn

from ...kernels.dispatch import Reason
from .attention import Attention, attention_reason, kernel_reason
from .classes import plain_class
from .modules import (
    Conv2d,
    GroupNorm,
    GroupNormSiLU,
    ResnetBlock2D,
    SiLU,
    Transformer2DModel,
    block_reason,
    convolution_reason,
    follower_of,
    pair_reason,
    resnet_reason,
    transformer_reason,
)
from .report import Found

STRIDES = "_sign_fast_strides"
"""The attribute with the shapes and strides that a module's weights had before they were laid out in channels_last."""

# a network's last norm; the skip connections' in NCSN++'s up blocks
_PAIRS = (("conv_norm_out", "conv_act"), ("skip_norm", "act"))
_NORM, _NORM_SILU, _SUM, _ATTENTION = "GroupNorm", "GroupNorm–SiLU", "residual sum", "attention"
_ONE_PASS = "functional.group_norm_silu"
_JOINED = "functional.residual_group_norm_silu with the next norm; with gradients or compiled one addition"
_PLAIN = Reason(
    "it is diffusers' own: accelerate was told to leave it, or undone",
    "call it again without attention=False, channels_last=False",
)
_OVERRIDDEN = Reason("its forward is overridden on the instance", "accelerate before what overrides it")
_FORMAT = Reason("its weight is not in channels_last", "call accelerate again with channels_last=True")
_DERIVED = Reason("a class derived from diffusers', whose forward may differ")
_PARAMETER = Reason("its weight is no plain tensor (sharded, quantized or not loaded yet)", "accelerate before that")
_NONE_OF_OURS = Reason("sign_fast has no operation for it: torch.compile fuses it with its neighbours")


class Candidate(NamedTuple):
    """A module and what it can become: `ours`, or None with the reason."""

    name: str
    module: nn.Module
    kind: str
    uses: str
    ours: type[nn.Module] | None
    reason: Reason | None


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every module that there is something to say about, in the network's order."""
    with_silu = _norms_with_silu(model)
    for name, module in model.named_modules():
        plain = plain_class(module)
        if isinstance(module, nn.GroupNorm):
            kind = _NORM_SILU if module in with_silu else _NORM
            yield _candidate(name, module, kind, _ONE_PASS, nn.GroupNorm, with_silu.get(module, GroupNorm), None)
        elif module in with_silu:
            yield _candidate(name, module, "SiLU", "in its norm's pass", nn.SiLU, SiLU, None)
        elif isinstance(module, resnet.ResnetBlock2D):
            reason = resnet_reason(module)
            kind = _SUM if reason is None else f"{_NORM_SILU} and {_SUM}"
            yield _candidate(name, module, kind, _sum(module), resnet.ResnetBlock2D, ResnetBlock2D, reason)
        elif isinstance(module, resnet.ResnetBlockCondNorm2D | normalization.AdaGroupNorm):
            yield Candidate(name, module, plain.__name__, "", None, Reason("its norm's scale and shift are networks"))
        elif isinstance(module, transformer_2d.Transformer2DModel):
            ours = (transformer_2d.Transformer2DModel, Transformer2DModel, transformer_reason(module))
            yield _candidate(name, module, _SUM, _sum(module), *ours)
        elif isinstance(module, attention_processor.Attention):
            ours_too = (attention_processor.Attention, Attention, attention_reason(module))
            yield _candidate(name, module, _ATTENTION, "functional.attention", *ours_too)
        elif type(module) in (nn.Conv2d, Conv2d) and convolution_reason(module) is None:  # type: ignore[arg-type]
            uses = "functional.convolution in float32 on the CPU, else the device's library"
            yield _candidate(name, module, "3×3 convolution", uses, nn.Conv2d, Conv2d, None)
        elif isinstance(module, nn.LayerNorm) or plain.__name__ == "GEGLU":
            yield Candidate(name, module, plain.__name__, "", None, _NONE_OF_OURS)


def look(model: nn.Module, prefix: str, owned: bool) -> Iterator[Found]:
    """The model's sites as they are now, their names after `prefix`; `owned`: FSDP has its parameters."""
    split = _split(model)
    for c in candidates(model):
        name = ".".join(filter(None, (prefix, c.name)))
        reason = c.reason or (_PLAIN if type(c.module) is not c.ours else split.get(c.module))
        yield Found(name, c.kind, c.uses, reason)
        if reason is None and c.kind == _ATTENTION and kernel_reason(c.module) is not None:
            yield Found(name, "attention kernel", "", kernel_reason(c.module))
    kept = {
        ".".join(filter(None, (name, own))) for name, m in model.named_modules() for own in m.__dict__.get(STRIDES, ())
    }
    for name, parameter in images(model):
        reason = _PARAMETER if owned else parameter_reason(parameter)
        laid_out = name in kept and parameter.is_contiguous(memory_format=torch.channels_last)
        if reason is None and not laid_out:
            reason = _FORMAT
        yield Found(".".join(filter(None, (prefix, name))), "convolution weight", "channels_last", reason)


def images(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The four-dimensional parameters, which have a memory format."""
    return ((name, p) for name, p in model.named_parameters() if p.ndim == 4)


def parameter_reason(parameter: Tensor) -> Reason | None:
    """None where the parameter's memory format can be changed."""
    return None if type(parameter) is nn.Parameter and type(parameter.data) is Tensor else _PARAMETER


def _candidate(
    name: str,
    module: nn.Module,
    kind: str,
    uses: str,
    plain: type[nn.Module],
    ours: type[nn.Module],
    reason: Reason | None,
) -> Candidate:
    if plain_class(module) is not plain:
        reason = _DERIVED
    elif type(module) is plain and "forward" in module.__dict__ and not _keeps_ours(module):
        reason = _OVERRIDDEN
    return Candidate(name, module, kind, uses, ours, reason)


def _keeps_ours(module: nn.Module) -> bool:
    """Whether what overrides forward on the instance goes on to the class's own, which `become` then exchanges."""
    from .classes import bound_forwards

    return bool(bound_forwards(module, type(module)))


def _norms_with_silu(model: Any) -> dict[nn.Module, type[nn.Module]]:
    """The norms whose SiLU is called with them, and such SiLUs as are modules of their own, with what they become."""
    found: dict[nn.Module, type[nn.Module]] = {}
    for norm, silu in pairs(model):
        found |= {norm: GroupNormSiLU, silu: SiLU}
    for module in model.modules():
        if isinstance(module, resnet.ResnetBlock2D) and resnet_reason(module) is None:
            found |= {module.norm1: GroupNorm, module.norm2: GroupNorm}
    return found


def pairs(model: nn.Module) -> Iterator[tuple[nn.GroupNorm, nn.SiLU]]:
    """Each norm and the SiLU module that its owner calls with its output, and only with that."""
    for module in model.modules():
        for first, second in _PAIRS:
            norm, silu = getattr(module, first, None), getattr(module, second, None)
            if not isinstance(norm, nn.GroupNorm) or not isinstance(silu, nn.SiLU):
                continue
            if plain_class(norm) is nn.GroupNorm and plain_class(silu) is nn.SiLU:
                yield norm, silu


def _split(model: nn.Module) -> dict[nn.Module, Reason]:
    """The modules of ours that for now run step by step."""
    found: dict[nn.Module, Reason] = {}
    for module in model.modules():
        if type(module) is ResnetBlock2D and (reason := block_reason(module)) is not None:
            found |= {module: reason, module.norm1: reason, module.norm2: reason}
    for norm, silu in pairs(model):
        if type(norm) is GroupNormSiLU and (reason := pair_reason(norm)) is not None:
            found |= {norm: reason, silu: reason}
    return found


def _sum(module: Any) -> str:
    if follower_of(module) is not None:
        return _JOINED
    return "functional.combine" if getattr(module, "output_scale_factor", 1) != 1 else "one addition"

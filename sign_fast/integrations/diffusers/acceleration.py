"""`accelerate`: diffusers' UNets and autoencoders on sign_fast's operations, in place, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import SignFastError
from ...kernels.dispatch import Reason
from .classes import become, derived_since, is_ours, plain_class, sharded
from .report import Acceleration, Found
from .versions import require_diffusers

SUPPORTED = ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL")

_COMPILED = Reason("it is compiled already", "accelerate first, then torch.compile")


def accelerate(pipeline_or_model: Any, *, attention: bool = True, channels_last: bool = True) -> Acceleration:
    """Make diffusers' UNets and autoencoders run on sign_fast's operations, in place.

    Every GroupNorm–SiLU with the time embedding before it, or scale and shift after it, becomes one pass
    (`functional.group_norm_silu`); where the next norm is known, so do a residual sum and that norm
    (`functional.residual_group_norm_silu`); self-attention is `functional.attention`; images and convolutions are in
    channels_last. Outputs and gradients are as near to float64's as plain diffusers' (DESIGN, rule 1). Module names,
    parameters, state, hooks, processors, LoRA layers and isinstance stay; torch.compile goes through without a break.

    Args:
        pipeline_or_model: a DiffusionPipeline, a UNet2DModel, UNet2DConditionModel or AutoencoderKL, or a module with
            some of them inside (DistributedDataParallel, a PeftModel). Once more is once, and takes in what has been
            replaced since, such as an activation.
        attention: whether attention becomes ours.
        channels_last: whether weights, and so activations, become channels_last. An output is then laid out like that
            as well: reshape it rather than view it. FSDP's weights never do, and FSDP2 takes no others.

    Returns:
        What was changed and what was left, with reasons; `print` it. Its `restore` undoes it.

    Raises:
        SignFastError: diffusers is missing, nothing in it is supported, or it has been compiled already.
    """
    require_diffusers()
    from . import sites

    models = _models(pipeline_or_model)
    for name, model in models.items():
        if _is_compiled(pipeline_or_model, model):
            raise SignFastError(f"{name or type(model).__name__}: {_COMPILED}")
    channels_last = channels_last and not any(map(sharded, _roots(pipeline_or_model)))
    for model in models.values():
        _change(model, attention=attention, channels_last=channels_last)

    def look() -> Iterator[Found]:
        owned = any(map(sharded, _roots(pipeline_or_model)))
        for name, model in models.items():
            yield from sites.look(model, name, owned)
        yield from _others(pipeline_or_model, models)

    return Acceleration(look, lambda: restore(pipeline_or_model))


def restore(pipeline_or_model: Any) -> None:
    """Undo `accelerate`, also of a copy: classes and the strides of every parameter as they were, values as they are.

    Raises:
        SignFastError: diffusers is missing, nothing in it is supported, or a module is of a class made out of ours
            since (parametrized, sharded). Nothing is changed then.
    """
    require_diffusers()
    from . import sites

    models = _models(pipeline_or_model)
    for prefix, model in models.items():
        for name, module in model.named_modules(prefix=prefix):
            if derived_since(module):
                kind = type(module).__name__
                raise SignFastError(f"{name} has become a {kind} since accelerate: undo that, or restore before it")
    owned = any(map(sharded, _roots(pipeline_or_model)))
    for model in models.values():
        for module in model.modules():
            if is_ours(type(module)):  # a LoRA layer's convolution too, which peft makes of its base layer's class
                become(module, plain_class(module))
            _disconnect(module)
            for name, (shape, stride) in module.__dict__.pop(sites.STRIDES, {}).items():
                if not owned:
                    _lay_out(getattr(module, name, None), shape, stride)


# ---- what is accelerated ----


def _models(given: Any) -> dict[str, nn.Module]:
    """The supported models by their names: of components in a pipeline, of submodules in a module, "" for itself."""
    kinds = _kinds()
    found: dict[str, Any]
    if isinstance(given, nn.Module):
        found = {name: module for name, module in given.named_modules() if isinstance(module, kinds)}
        what = f"a {type(given).__name__}"
    elif isinstance(getattr(given, "components", None), dict):
        parts = [(name, part) for name, part in given.components.items() if isinstance(part, nn.Module)]
        found = {
            ".".join(filter(None, (name, inner))): module
            for name, part in parts
            for inner, module in part.named_modules()
            if isinstance(module, kinds)
        }
        what = f"a {type(given).__name__} of {', '.join(type(part).__name__ for _, part in parts) or 'no networks'}"
    else:
        raise SignFastError(f"a diffusers pipeline or model is needed, not a {type(given).__name__}")
    if not found:
        raise SignFastError(f"{what} has nothing to accelerate: {', '.join(SUPPORTED)} are supported")
    return found


def _roots(given: Any) -> list[nn.Module]:
    parts = [given] if isinstance(given, nn.Module) else given.components.values()
    return [part for part in parts if isinstance(part, nn.Module)]


def _kinds() -> tuple[type, ...]:
    import diffusers

    return tuple(getattr(diffusers, name) for name in SUPPORTED if hasattr(diffusers, name))


def _is_compiled(given: Any, model: nn.Module) -> bool:
    """Whether the model or part of it runs compiled, where a change of classes would come too late or be recompiled."""
    roots = _roots(given)
    wrappers = [root for root in roots if type(root).__name__ == "OptimizedModule" and model in set(root.modules())]
    return bool(wrappers) or any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def _others(given: Any, models: dict[str, nn.Module]) -> Iterator[Found]:
    """A pipeline's other networks."""
    if isinstance(given, nn.Module):
        return
    for name, part in given.components.items():
        if isinstance(part, nn.Module) and not any(key.partition(".")[0] == name for key in models):
            yield Found(name, type(part).__name__, "", Reason(f"only {', '.join(SUPPORTED)} are supported"))


# ---- changing ----


def _change(model: nn.Module, *, attention: bool, channels_last: bool) -> None:
    from . import followers, sites
    from .attention import Attention
    from .modules import ACTIVATION, Conv2d

    left = [*([] if attention else [Attention]), *([] if channels_last else [Conv2d])]  # C++ convolves in channels_last
    for found in list(sites.candidates(model)):
        if found.ours is None or found.reason is not None or found.ours in left:
            continue
        become(found.module, found.ours)
    for module in model.modules():
        _disconnect(module)
    for norm, silu in sites.pairs(model):
        norm.__dict__[ACTIVATION] = silu
    for module in model.modules():
        if hasattr(module, "mid_block"):
            followers.connect(module)
    if channels_last:
        for module in model.modules():  # all before the first is changed: two modules may share one
            _keep_strides(module)
        for _, parameter in sites.images(model):
            if sites.parameter_reason(parameter) is None:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _disconnect(module: nn.Module) -> None:
    from .modules import ACTIVATION, FOLLOWER

    module.__dict__.pop(ACTIVATION, None)
    module.__dict__.pop(FOLLOWER, None)


def _keep_strides(module: nn.Module) -> None:
    from . import sites

    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 4 and sites.parameter_reason(parameter) is None:
            kept = module.__dict__.setdefault(sites.STRIDES, {})
            kept.setdefault(name, (parameter.shape, parameter.stride()))


def _lay_out(parameter: Any, shape: torch.Size, stride: tuple[int, ...]) -> None:
    """Strides as they were; a parameter of another shape is another one and stays as it is."""
    from . import sites

    if isinstance(parameter, nn.Parameter) and parameter.shape == shape and not sites.parameter_reason(parameter):
        data = parameter.data
        parameter.data = torch.empty_strided(data.shape, stride, dtype=data.dtype, device=data.device).copy_(data)

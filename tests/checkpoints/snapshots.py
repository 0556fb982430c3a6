"""Writes snapshots as the published programs do: networks of persistent classes, each carrying its module's source."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from sign_fast.models import EDMPrecond
from sign_fast.models.presets import CLASSES
from sign_fast.nn import Conv2d

SENTINEL = "module_src was run"
SOURCE = f"import builtins\nbuiltins.{SENTINEL.replace(' ', '_')} = True\nraise SystemExit('{SENTINEL}')\n"
_PARTS = {*CLASSES, "SongUNet", "DhariwalUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm"}
_PARTS |= {"PositionalEmbedding", "FourierEmbedding"}


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__file__"] = f"{name}.py"
    return module


class _Dict(dict):
    """dnnlib's dictionary with attributes, as it is pickled."""


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("the published reader ran")


class _Persistent:
    """An object that is pickled as a persistent class's."""

    def __init__(self, class_name: str, state: dict[str, Any], **changed: Any) -> None:
        self.meta = _Dict(type="class", version=6, module_src=SOURCE, class_name=class_name, state=state)
        self.meta.update(changed)

    def __reduce__(self) -> Any:
        return _reconstruct_persistent_obj, (self.meta,), None


@contextlib.contextmanager
def published_modules() -> Iterator[None]:
    """The modules whose names a snapshot has, for as long as one is written."""
    modules = {name: _module(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    for thing, module, name in (
        (_reconstruct_persistent_obj, "torch_utils.persistence", "_reconstruct_persistent_obj"),
        (_Dict, "dnnlib.util", "EasyDict"),
    ):
        setattr(modules[module], name, thing)
        thing.__module__, thing.__qualname__, thing.__name__ = module, name, name  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def persistent(net: nn.Module, kwargs: dict[str, Any], **changed: Any) -> _Persistent:
    """A module and its children as persistent objects; torch's own containers stay what they are.

    Args:
        net: of `sign_fast.models`.
        kwargs: its constructor's arguments.
        changed: other values of the record, e.g. version.
    """
    return _Persistent(type(net).__name__, _state(net, kwargs), **changed)


def storing(class_name: str, **state: Any) -> _Persistent:
    """Another persistent object, e.g. a loss."""
    return _Persistent(class_name, state)


def _state(net: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    state = dict(net.__dict__)
    for own in ("_init_kwargs", "dtype", "box", "resampling"):  # what only ours have
        state.pop(own, None)
    state["_modules"] = dict(net._modules)
    for name, child in net._modules.items():
        state["_modules"][name] = _child(child)
    state["_init_args"] = ()
    state["_init_kwargs"] = _Dict(kwargs)
    if "skip_scale" in state:
        state["skip_scale"] = np.sqrt(0.5)  # a number of NumPy's, as published
    if isinstance(net, Conv2d) and net.weight is None:
        state["weight"] = state["bias"] = None
    return state


def _child(child: nn.Module | None) -> Any:
    if child is None or type(child).__name__ not in _PARTS:
        if isinstance(child, nn.ModuleDict):
            copy = nn.ModuleDict()
            copy.__dict__["_modules"] = {name: _child(part) for name, part in child.items()}
            return copy
        return child
    return persistent(child, {"init": _Dict(init_mode="xavier_uniform", init_weight=np.sqrt(0.2))})


class _ZipStorages(pickle.Pickler):
    """Storages as blobs of torch.save's newer format, zip."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (torch.storage.TypedStorage, torch.storage.UntypedStorage)):
            file = io.BytesIO()
            torch.save(obj, file)
            return torch.storage._load_from_bytes, (file.getvalue(),)
        return NotImplemented


def write_snapshot(entries: dict[str, Any] | Any, protocol: int = 4, zip_storages: bool = False) -> bytes:
    """The bytes of a snapshot of networks that `persistent` made, and of whatever else."""
    file = io.BytesIO()
    with published_modules():
        (_ZipStorages if zip_storages else pickle.Pickler)(file, protocol).dump(entries)
    return file.getvalue()


TINY: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 0,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def tiny(seed: int = 0, **changed: Any) -> EDMPrecond:
    """A small network."""
    torch.manual_seed(seed)
    return EDMPrecond(**{**TINY, **changed}).eval().requires_grad_(False)


def tiny_snapshot(**arguments: Any) -> bytes:
    """A snapshot of `tiny()` as EDM's programs write one."""
    return write_snapshot({"ema": persistent(tiny(), TINY), "loss_fn": None, "augment_pipe": None}, **arguments)

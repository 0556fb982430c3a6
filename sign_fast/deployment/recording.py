"""Which calls of our operators a network makes, generating and in distillation, recorded on the meta device.

Nothing is computed there, so that the largest networks are read off in seconds on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..distill.iteration import Iteration
from ..distill.networks import build_networks
from ..distill.settings import DistillSettings
from ..inference.launches import LaunchCounter
from ..kernels.packs.calls import BATCH, Call, call_of
from ..models.precond import Precond
from ..models.presets import CLASSES
from ..sampling.engine import Engine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the samplers differ in between two calls of the network: the number of states and noises, and their dtypes
_SAMPLERS: tuple[tuple[str, int], ...] = (("one_step", 1), ("few_step", 4), ("edm", 4), ("ablation", 4))
_TIME_FREE_SAMPLERS: tuple[tuple[str, int], ...] = (("recursive", 2),)
# Distillations that differ in the operators that they call
_METHODS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("sid", {}),
    ("sid", {"update": "combined"}),
    ("sida", {"adversarial_kimg": 0, "student_kimg": 0}),
    ("sida", {"adversarial_kimg": 0, "student_kimg": 0, "update": "combined"}),
    ("sign", {}),
    ("sign", {"update": "combined"}),
    ("sign", {"matching": "sid"}),
)


class CallRecorder(LaunchCounter):
    """Records, while entered, the calls of our operators on meta tensors.

    Attributes:
        calls: each different one once, in the order of first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}

    def _ours(self, name: str, args: Any) -> Any:
        self.calls.setdefault(call_of(name, args))
        return super()._ours(name, args)


@contextmanager
def recording() -> Iterator[dict[Call, None]]:
    """The calls that code in this context makes with meta tensors whose batch is `BATCH`."""
    with CallRecorder() as recorder:
        yield recorder.calls


def _on_meta(cls: str, kwargs: dict[str, Any]) -> Precond:
    """The network without values, laid out as networks are loaded."""
    with torch.device("meta"):
        return CLASSES[cls](**kwargs).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def generation(cls: str, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[Call, None]:
    """The calls of a network's generations by all samplers, from seeds to bytes and floats.

    Args:
        cls, kwargs: the network's class name and arguments.
        dtype: of its inner network.
    """
    net = _on_meta(cls, kwargs).eval()
    samplers = _TIME_FREE_SAMPLERS if getattr(net, "time_free", False) else _SAMPLERS
    engine = Engine(net, dtype=dtype)
    with recording() as calls:
        for sampler, steps in samplers:
            for labels in (False, True) if net.label_dim else (False,):
                engine.rehearse(sampler, steps, BATCH, labels=labels)
    return calls


def distillation(cls: str, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[Call, None]:
    """The calls of an iteration of every method with such a teacher.

    Args:
        cls, kwargs, dtype: as for `generation`.
    """
    calls: dict[Call, None] = {}
    for method, settings in _METHODS:
        teacher = _on_meta(cls, kwargs)
        teacher.dtype = dtype
        networks = build_networks(teacher, cls, kwargs, time_free=method == "sign")
        with recording() as found:
            _iterate(Iteration(DistillSettings(method, "", batch=BATCH, **settings), networks), teacher)
        calls |= found
    return calls


def _iterate(updates: Iteration, teacher: Precond) -> None:
    images = _images(teacher)
    labels = torch.empty(BATCH, teacher.label_dim, device="meta") if teacher.label_dim else None
    method = updates.settings.method
    updates.run(0, None if method == "sid" else images, None if method == "sid" else labels)


def _images(net: Any) -> Tensor:
    """(BATCH, C, H, W) in channels_last, as data come."""
    size = (BATCH, net.img_channels, net.img_resolution, net.img_resolution)
    return torch.empty(size, device="meta").to(memory_format=torch.channels_last)


def calls_of(cls: str, kwargs: dict[str, Any], dtypes: Sequence[torch.dtype] = DTYPES) -> dict[Call, None]:
    """All calls of a network: generating, in distillation as teacher, fake score and student, and its SIGN student's.

    Args:
        cls, kwargs: the network's class name and arguments; of a time-free student only its generations are taken.
        dtypes: of its inner network.
    """
    kinds = [(cls, kwargs)]
    if cls != "IdempotentPrecond":
        student = build_networks(_on_meta(cls, kwargs), cls, kwargs, time_free=True)
        kinds.append((student.student_class, student.student_kwargs))
    calls: dict[Call, None] = {}
    for dtype in dtypes:
        for kind in kinds:
            calls |= generation(*kind, dtype)
        if cls != "IdempotentPrecond":
            calls |= distillation(cls, kwargs, dtype)
    return calls

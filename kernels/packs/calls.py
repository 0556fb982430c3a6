"""Calls of our operators as data: what a network asks of a GPU, for any batch, without the network.

`calls.json` holds those of the networks that wheels are built for; `sign_fast.deployment` writes it from the networks
themselves. From a call and a device's figures follow the launches, and from these what has to be compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import Device, assuming
from ..launch import Launch, noting
from ..operators import on_gpu

BATCH = 1009
"""Images while calls are recorded: a prime that no other size has, so that sizes it divides grow with the batch."""

# The engine's buckets, and three times as many: what is specialised on a batch is whether it is 1, whether 16 divides
# it, and which launch configuration its number of programs leads to
BATCHES = tuple(sorted({2**i for i in range(10)} | {3 * 2**i for i in range(8)}))

_PATH = Path(__file__).with_name("calls.json")


@dataclass(frozen=True)
class Shape:
    """A tensor without values: dtype's name, sizes, strides, storage offset; −3 is three times the batch."""

    dtype: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def at(self, batch: int) -> Tensor:
        """The tensor of that batch on the meta device."""

        def real(numbers: Iterable[int]) -> list[int]:
            return [-n * batch if n < 0 else n for n in numbers]

        size, stride = real(self.size), real(self.stride)
        extent = self.offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        memory = torch.empty(max(extent, 0), dtype=getattr(torch, self.dtype), device="meta")
        return memory.as_strided(size, stride, self.offset)


@dataclass(frozen=True)
class Call:
    """An operator's name and its arguments: Shapes, tuples of them, torch dtypes, numbers, None."""

    operator: str
    arguments: tuple[Any, ...]

    def launches(self, batch: int, device: Device) -> list[Launch]:
        """What the operator launches on such a GPU for that many images."""
        _register()
        with assuming(device), noting() as found:
            on_gpu[self.operator](*(_real(argument, batch) for argument in self.arguments))
        return found


def call_of(operator: str, arguments: Iterable[Any]) -> Call:
    """The call that was made with these arguments, its tensors on the meta device and of batch `BATCH`."""
    return Call(operator, tuple(map(_abstract, arguments)))


@cache
def _register() -> None:
    for operation in ("attention", "combine", "distill_loss", "group_norm_silu", "sampler_step"):
        import_module(f"...{operation}.registration", __name__)


def _abstract(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        name = str(argument.dtype).removeprefix("torch.")
        size, stride = (_in_batches(numbers) for numbers in (argument.shape, argument.stride()))
        return Shape(name, size, stride, int(argument.storage_offset()))
    if isinstance(argument, list | tuple):
        return tuple(map(_abstract, argument))
    if isinstance(argument, int) and argument and argument % BATCH == 0:
        raise ValueError(f"an operator's argument depends on the batch: {argument}")
    return argument


def _in_batches(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(-(n // BATCH) if n and n % BATCH == 0 else n for n in numbers)


def _real(argument: Any, batch: int) -> Any:
    if isinstance(argument, Shape):
        return argument.at(batch)
    if isinstance(argument, tuple):
        return [_real(item, batch) for item in argument]
    return argument


# ---- files ----


def _plain(argument: Any) -> Any:
    if isinstance(argument, Shape):
        return {"tensor": [argument.dtype, argument.size, argument.stride, argument.offset]}
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    return [_plain(item) for item in argument] if isinstance(argument, tuple) else argument


def _parsed(argument: Any) -> Any:
    if isinstance(argument, dict):
        if "dtype" in argument:
            return getattr(torch, argument["dtype"])
        dtype, size, stride, offset = argument["tensor"]
        return Shape(dtype, tuple(size), tuple(stride), offset)
    return tuple(map(_parsed, argument)) if isinstance(argument, list) else argument


def to_json(networks: Mapping[str, Iterable[Call]]) -> str:
    """The calls of each network by name, as `calls.json` has them: a call a line, each once."""
    numbers: dict[Call, int] = {}
    table = {name: [numbers.setdefault(call, len(numbers)) for call in calls] for name, calls in networks.items()}
    calls = ",\n".join(json.dumps([c.operator, *map(_plain, c.arguments)], separators=(",", ":")) for c in numbers)
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(used)}" for name, used in table.items())
    return f'{{"calls": [\n{calls}\n],\n"networks": {{\n{rows}\n}}}}\n'


def from_json(text: str) -> dict[str, list[Call]]:
    """What `to_json` was given."""
    facts = json.loads(text)
    calls = [Call(operator, tuple(map(_parsed, arguments))) for operator, *arguments in facts["calls"]]
    return {name: [calls[i] for i in used] for name, used in facts["networks"].items()}


def networks() -> dict[str, list[Call]]:
    """The calls of the networks that wheels are built for, by the network's name."""
    return from_json(_PATH.read_text())

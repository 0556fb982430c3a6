"""Programs at random: every operation with every option, in shapes that no network of the library has."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from sign_fast.inference.program import (
    Attention,
    Buffer,
    Columns,
    Convolution,
    Filter,
    JoinNorm,
    Norm,
    Operation,
    Program,
)


class _Writer:
    """Writes a program of random operations on random buffers, those that were not read yet first."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers: list[Buffer] = []
        self.operations: list[Operation] = []
        self.constants: list[Tensor] = []
        self.width = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def constant(self, value: Tensor) -> int:
        self.constants.append(value)
        return len(self.constants) - 1

    def vector(self, channels: int, around: float = 0.0) -> int:
        return self.constant(around + 0.3 * self.normal(channels))

    def maybe(self, channels: int) -> int | None:
        return self.vector(channels) if self.random.random() < 0.5 else None

    def columns(self, channels: int) -> Columns | None:
        if self.random.random() < 0.5:
            return None
        self.width += channels
        return Columns(self.width - channels, self.width)

    def buffer(self, channels: int, height: int, width: int) -> int:
        self.buffers.append(Buffer(channels, height, width))
        return len(self.buffers) - 1

    def source(self) -> int:
        """A buffer, the newest ones most often."""
        return max(self.random.randrange(len(self.buffers)) for _ in range(2))

    def like(self, *shape: int) -> list[int]:
        return [i for i, b in enumerate(self.buffers) if (b.channels, b.height, b.width) == shape]

    def residual(self, *shape: int) -> int | None:
        found = self.like(*shape)
        return self.random.choice(found) if found and self.random.random() < 0.8 else None

    def factor(self) -> float:
        return self.random.choice([1.0, 0.5**0.5, 0.75])

    def inputs(self) -> tuple[int, ...]:
        first = self.source()
        b = self.buffers[first]
        fits = [i for i, o in enumerate(self.buffers) if (o.height, o.width) == (b.height, b.width)]
        return (first, self.random.choice(fits)) if self.random.random() < 0.4 else (first,)

    def channels(self, inputs: tuple[int, ...]) -> int:
        return sum(self.buffers[i].channels for i in inputs)

    # ---- operations ----

    def convolution(self, out_channels: int | None = None) -> None:
        inputs = self.inputs()
        b, kernel = self.buffers[inputs[0]], self.random.choice([1, 3])
        resampling = self.random.choice(["none", "none", "up", "down"]) if b.height * b.width <= 400 else "down"
        if resampling == "down" and (b.height % 2 or b.width % 2):
            resampling = "none"
        height, width = (n * 2 if resampling == "up" else n // 2 if resampling == "down" else n
                         for n in (b.height, b.width))  # fmt: skip
        padding = kernel // 2
        if len(inputs) == 1 and resampling == "none" and self.random.random() < 0.2:
            padding += 1
            height, width = height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1
        out_channels = out_channels or self.random.choice([b.channels, self.random.randint(1, 40)])
        depth = self.channels(inputs)
        weight = self.normal(out_channels, depth, kernel, kernel) / (depth * kernel**2) ** 0.5
        residual = self.residual(out_channels, height, width)
        half = self.residual(out_channels, height // 2, width // 2) if height % 2 == width % 2 == 0 else None
        up = residual is None and half is not None and padding == kernel // 2
        self.operations.append(
            Convolution(
                inputs,
                self.buffer(out_channels, height, width),
                self.constant(weight),
                self.maybe(out_channels),
                padding,
                resampling,  # type: ignore[arg-type]
                half if up else residual,
                up,
                self.factor(),
                self.factor(),
            )
        )

    def filter(self) -> None:
        source = self.source()
        b, up = self.buffers[source], self.random.random() < 0.5
        if (up and b.height * b.width > 400) or min(b.height, b.width) < 4:
            return self.norm()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / (16 if up else 64)
        height, width = ((2 * n if up else n // 2) for n in (b.height, b.width))
        residual = self.residual(b.channels, height, width)
        output = self.buffer(b.channels, height, width)
        index, bias = self.constant(taps), self.maybe(b.channels)
        self.operations.append(Filter(source, output, index, up, 1, bias, residual, self.factor()))

    def norm(self) -> None:
        inputs = self.inputs()
        b, channels = self.buffers[inputs[0]], self.channels(inputs)
        groups = self.random.choice([g for g in range(1, channels + 1) if channels % g == 0])
        output, weight, bias = self.buffer(channels, b.height, b.width), self.vector(channels, 1), self.vector(channels)
        rows = (self.columns(channels), self.columns(channels), self.columns(channels))
        silu = self.random.random() < 0.5
        self.operations.append(Norm(inputs, output, groups, 1e-5, weight, bias, self.maybe(channels), *rows, silu))

    def join_norm(self) -> None:
        source = self.source()
        b = self.buffers[source]
        skip = self.random.choice(self.like(b.channels, b.height, b.width))
        groups = self.random.choice([g for g in range(1, b.channels + 1) if b.channels % g == 0])
        total, output = (self.buffer(b.channels, b.height, b.width) for _ in range(2))
        weight, bias, silu = self.vector(b.channels, 1), self.vector(b.channels), self.random.random() < 0.5
        join = self.maybe(b.channels)
        self.operations.append(
            JoinNorm(source, skip, total, output, self.factor(), join, groups, 1e-5, weight, bias, silu)
        )

    def attention(self) -> None:
        self.operations.append(self._projection())
        source = self.operations[-1].output
        b = self.buffers[source]
        heads = self.random.choice([h for h in (1, 2, 4) if b.channels // 3 % h == 0])
        self.operations.append(Attention(source, self.buffer(b.channels // 3, b.height, b.width), heads))

    def _projection(self) -> Convolution:
        source = self.source()
        b, channels = self.buffers[source], self.random.choice([4, 8, 20, 36])
        weight = self.normal(3 * channels, b.channels, 1, 1) / b.channels**0.5
        output = self.buffer(3 * channels, b.height, b.width)
        return Convolution((source,), output, self.constant(weight), self.maybe(3 * channels), 0)


def random_program(seed: int, operations: int = 14) -> Program:
    """In float32 on the CPU; its output has the shape of its input, or another one."""
    writer = _Writer(seed)
    side = writer.random.choice([(8, 8), (6, 10), (5, 7), (16, 16), (1, 1), (2, 3), (12, 4)])
    writer.buffer(writer.random.choice([1, 3, 16]), *side)
    writer.convolution(writer.random.choice([8, 16, 20]))
    kinds = [writer.convolution] * 3 + [writer.norm, writer.join_norm, writer.filter, writer.attention]
    while len(writer.operations) < operations:
        writer.random.choice(kinds)()
    writer.norm()  # every output is of order 1
    last = writer.operations[-1]
    assert isinstance(last, Norm)
    buffers, constants = tuple(writer.buffers), tuple(writer.constants)
    return Program(tuple(writer.operations), buffers, constants, last.output, max(writer.width, 1))


def in_dtype(program: Program, dtype: torch.dtype) -> Program:
    """As `build` makes it: weights and filters in `dtype`, the rest in float32, float64 where `dtype` is."""
    narrow = {o.weight for o in program.operations if isinstance(o, Convolution)}
    narrow |= {o.filter for o in program.operations if isinstance(o, Filter)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    constants = (c.to(dtype if i in narrow else wide) for i, c in enumerate(program.constants))
    return replace(program, constants=tuple(constants))


def program_inputs(program: Program, batch: int, seed: int, shared_rows: bool = False) -> tuple[Tensor, Tensor]:
    """x and conditioning rows, float32."""
    generator = torch.Generator().manual_seed(seed)
    b = program.buffers[0]
    x = torch.randn(batch, b.channels, b.height, b.width, generator=generator)
    rows = 0.3 * torch.randn(1 if shared_rows else batch, program.width, generator=generator)
    return x, rows


def large_images(channels: int, side: int = 256) -> Program:
    """x -> x + 1×1 convolution of the norm of a 1×1 convolution of x: all memory, hardly any work."""
    writer = _Writer(0)
    x, h, normed, y = (writer.buffer(c, side, side) for c in (1, channels, channels, 1))
    first, last = (writer.constant(writer.normal(*shape)) for shape in ((channels, 1, 1, 1), (1, channels, 1, 1)))
    emb = Columns(0, channels)
    norm = Norm((h,), normed, 4, 1e-5, writer.vector(channels, 1), writer.vector(channels), None, emb)
    operations = (
        Convolution((x,), h, first, None, 0),
        norm,
        Convolution((normed,), y, last, None, 0, residual=x),
    )
    return Program(operations, tuple(writer.buffers), tuple(writer.constants), y, channels)

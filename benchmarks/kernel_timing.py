"""Times of one kernel call: on a GPU from a cold second-level cache by CUDA events, on a CPU in turns by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Direction, Inputs, Outputs
from benchmarks.measure import quantile

Function = Callable[[], object]
Times = list[float]  # seconds


def prepare(inputs: Inputs, forward: Callable[[Inputs], Outputs], direction: Direction) -> Callable[[], Outputs]:
    """What is timed: the forward call without gradients, or the backward of one that has been made."""
    if direction == "forward":

        def call() -> Outputs:
            with torch.no_grad():
                return forward(inputs)

        return call
    outputs = [y for y in forward(inputs) if y.requires_grad]
    wanted = [t for t in inputs.values() if t.requires_grad]
    # no random numbers: this may run while a graph is captured
    upstream = [
        torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)) for y in outputs
    ]
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def difference(case: Case, inputs: Inputs, direction: Direction) -> float:
    """‖ours − expected‖ / ‖expected‖, the largest over all outputs or all gradients."""
    found: list[list[Tensor]] = []
    for forward in (case.ours, case.expected):
        result = prepare(inputs, forward, direction)()
        found.append([t.detach().double() for t in result])
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(*found, strict=True))


class Gpu:
    """Cold-cache timing on the current CUDA device.

    Each call is captured in a CUDA graph, so that only the device's work is timed, and runs after a write to a buffer
    twice as large as the L2 cache.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties("cuda")
        self._flush = torch.empty(max(2 * properties.L2_cache_size, 64 << 20), dtype=torch.uint8, device="cuda")
        self.stream = torch.cuda.Stream()

    def capture(self, function: Function) -> Function:
        """The call as a graph's replay; its forward must have run on `stream`."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                function()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            kept = function()

        def replay(outputs: object = kept) -> None:  # the outputs' memory belongs to the graph
            graph.replay()

        return replay

    def time(self, replay: Function, seconds: float, cold: bool = True) -> Times:
        """At least 10 runs, at most 200, within `seconds`."""
        with torch.cuda.stream(self.stream):
            estimate = self._runs(replay, 5, cold)
            each = sum(estimate) / len(estimate) + self._flush.nbytes / 2e12
            return self._runs(replay, int(min(200, max(10, seconds / each))), cold)

    def _runs(self, replay: Function, count: int, cold: bool) -> Times:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            if cold:
                self._flush.zero_()
            start.record()
            replay()
            end.record()
        self.stream.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in events]

    def copy_rate(self, nbytes: int = 1 << 31) -> float:
        """Bytes a second, read and written together, of a device-to-device copy that moves `nbytes`."""
        with torch.cuda.stream(self.stream):
            source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda").random_()
            target = torch.empty_like(source)
            times = self.time(self.capture(lambda: target.copy_(source)), 0.3)
        return 2 * source.nbytes / quantile(times, 0.5)

    def matrix_rate(self, dtype: torch.dtype, size: int = 8192) -> float:
        """Floating-point operations a second of a large matrix product."""
        with torch.cuda.stream(self.stream):
            a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
            times = self.time(self.capture(lambda: a @ b), 0.3, cold=False)
        return 2 * size**3 / quantile(times, 0.5)


def in_turns(functions: Mapping[str, Function], seconds: float) -> dict[str, Times]:
    """Rounds in which each function runs once, in rotating order, so that drift of the machine hits all alike."""
    for function in functions.values():
        function()
    times: dict[str, Times] = {name: [] for name in functions}
    names = list(functions)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 5 or time.perf_counter() < end:
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            before = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - before)
        turn += 1
    return times


def on_stream(gpu: Gpu | None) -> torch.cuda.StreamContext | nullcontext[None]:
    """Backward runs where its forward ran: all of it on the stream that graphs are captured on."""
    return nullcontext() if gpu is None else torch.cuda.stream(gpu.stream)

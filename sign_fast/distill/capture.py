"""An iteration as one CUDA graph launch: a graph for every kind of iteration, all in the device's shared pool."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SignFastError, first_line
from ..sampling.capture import Capture, CudaCapture, Recording
from ..sampling.graphs import WARM_UPS, out_of_memory
from ..sampling.synchronising import find_synchronising
from .draws import Draws
from .method import Losses, Step

Update = Callable[[Step, bool], Losses]


@dataclass
class _Graph:
    recording: Recording
    names: list[str]


class CapturedUpdates:
    """`Iteration.update` by replays of what it did before.

    Of each kind of iteration (which call of the student, which terms and networks take part, which shapes) the first
    two run as they are, which compiles kernels, picks algorithms and makes the optimizers' state; then it is captured.
    So a run's weights are those of a run without graphs. The graphs take seeds, images, labels and pairs as inputs,
    read learning rates and ramps from tensors, and dropout from torch's generator.

    Args:
        device: a CUDA device.
        update: all that it reads and changes stays where it is, or `clear` is called.
        capture: what captures; tests hand in a stand-in.
    """

    def __init__(
        self, device: torch.device, update: Update, capture: Callable[[torch.device], Capture] = CudaCapture
    ) -> None:
        self._update = update
        self._capture = capture(device)
        self._inputs: dict[Hashable, Tensor] = {}
        self._runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    def run(self, step: Step, student_moves: bool) -> Losses:
        """As `Iteration.update`.

        Raises:
            SignFastError: it cannot be captured, or memory does not suffice for a graph.
        """
        given = _tensors(step)
        shapes = tuple((name, t.shape, t.dtype) for name, t in given.items())
        key = (step.call, step.adversarial, student_moves, shapes)
        with self._capture.turn():
            static = self._filled(step, given)
            graph = self._graphs.get(key)
            if graph is None and self._runs[key] < WARM_UPS:
                self._runs[key] += 1
                with self._capture.aside():
                    return self._update(static, student_moves)
            if graph is None:
                graph = self._graphs[key] = self._captured(static, student_moves)
            graph.recording.replay()
            return dict(zip(graph.names, graph.recording.output.clone().unbind(), strict=True))

    def clear(self) -> None:
        """Give up the graphs: what they read or change has moved."""
        self._runs.clear()
        if self._graphs:
            with self._capture.turn():
                while self._graphs:
                    self._graphs.popitem()[1].recording.reset()
                self._capture.release()

    def _captured(self, step: Step, student_moves: bool) -> _Graph:
        names: list[str] = []

        def function() -> Tensor:
            losses = self._update(step, student_moves)
            names[:] = losses
            return torch.stack(list(losses.values()))

        self._capture.release()  # what the runs before took: the graph brings memory of its own
        with self._capture.aside():
            try:
                return _Graph(self._capture.record(function), names)
            except RuntimeError as error:
                remedy = "or turn capture off"
                if out_of_memory(error):
                    raise SignFastError(
                        f"not enough GPU memory for a graph of the iteration: raise the accumulation, use "
                        f"checkpointing, {remedy} ({first_line(error)})"
                    ) from error
                found = find_synchronising(function, self._capture.record)
                why = f"{found}; remove it" if found else f"{first_line(error)}; mend it"
                raise SignFastError(f"the iteration cannot be captured: {why} {remedy}") from error

    def _filled(self, step: Step, given: dict[str, Tensor]) -> Step:
        """The step with its tensors where graphs read them."""
        inputs: dict[str, Tensor] = {}
        for name, t in given.items():
            place = (name, t.shape, t.dtype)
            if place not in self._inputs:
                self._inputs[place] = torch.empty_like(t)
            inputs[name] = self._inputs[place]
            inputs[name].copy_(t, non_blocking=True)
        pairs = None if step.pairs is None else (inputs["z"], inputs["y"], inputs.get("pair_labels"))
        return dataclasses.replace(
            step,
            draws=Draws(inputs["seeds"]),
            images=inputs.get("images"),
            labels=inputs.get("labels"),
            pairs=pairs,
        )


def _tensors(step: Step) -> dict[str, Tensor]:
    z, y, pair_labels = step.pairs or (None, None, None)
    found = {
        "seeds": step.draws.seeds,
        "images": step.images,
        "labels": step.labels,
        "z": z,
        "y": y,
        "pair_labels": pair_labels,
    }
    return {name: t for name, t in found.items() if t is not None}

"""What is compared in training: each a way to run one whole iteration of a distillation.

plain: the published loop in ordinary PyTorch (`benchmarks.plain_distill`), float32 as PyTorch is set up: on CUDA
convolutions may be TF32. plain_no_tf32: without. compile: its networks by torch.compile, channels_last, under bf16
autocast. sign_fast, sign_fast_combined: the library's trainer with the alternating and the combined update.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cold
from benchmarks.plain_distill import PlainSiD, StepDraws
from benchmarks.providers import Case, build_network
from sign_fast import models
from sign_fast.checkpoints.store import bundled_names, save_network
from sign_fast.errors import SignFastError
from sign_fast.models.presets import preset, preset_names

COUNTED_BATCH = 4


@dataclass(frozen=True)
class TrainingCase:
    """What is trained.

    Args:
        teacher: bundled name or folder of the denoiser.
        batch: images an iteration.
        precision: "fp32", "bf16" or "fp16" of the library's trainer; plain and compile have their own.
        device: where. seed: of the draws. dropout: of student and fake score, None keeps the teacher's.
        method: of distillation.
        lr, eps: of Adam.
    """

    teacher: str
    batch: int
    precision: str = "fp32"
    device: str = "cpu"
    seed: int = 0
    dropout: float | None = None
    capture: bool | None = None
    method: str = "sid"
    lr: float = 1e-5
    eps: float = 1e-8


def teacher_of(name: str, folder: Path, seed: int = 0) -> str:
    """A bundled name or a network's folder as it is; for a preset without weights, seeded random ones in `folder`."""
    if name in bundled_names() or name not in preset_names():
        return name
    net = build_network(Case(name, "few_step", 1, "float32", "cpu", seed))
    save_network(folder, net.state_dict(), *preset(name), role="teacher")
    return str(folder)


class TrainingProvider:
    """One way to run an iteration.

    Args:
        name: of PROVIDERS.
        case: what is trained.
    """

    dtype = "float32"
    networks: Sequence[nn.Module] = ()
    """Teacher, fake score, student and average as they are called; empty where hooks would be in the way."""

    def __init__(self, name: str, case: TrainingCase) -> None:
        self.name = name
        self.case = case

    def iteration(self) -> Any:
        """One iteration, enqueued on the device."""
        raise NotImplementedError

    def __call__(self) -> float:
        """One whole iteration; its seconds, by events on CUDA."""
        if not self.case.device.startswith("cuda"):
            before = time.perf_counter()
            self.iteration()
            return time.perf_counter() - before
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.iteration()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


class PlainTraining(TrainingProvider):
    """The published loop; cuDNN searches for its algorithms."""

    tf32 = True
    autocast: torch.dtype | None = None

    def __init__(self, name: str, case: TrainingCase) -> None:
        super().__init__(name, case)
        torch.manual_seed(case.seed)
        self.loop = PlainSiD(self.network(), case.batch, autocast=self.autocast, lr=case.lr, eps=case.eps)
        self.networks = (self.loop.teacher, self.loop.fake, self.loop.student, self.loop.ema)

    def network(self) -> Any:
        """The teacher that the loop copies."""
        net = models.load(self.case.teacher, self.case.device)
        if self.case.dropout is not None:
            for module in net.modules():
                if hasattr(module, "dropout"):
                    module.dropout = self.case.dropout
        return net

    def iteration(self, *draws: StepDraws) -> tuple[Tensor, Tensor]:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.tf32):
            return self.loop.iteration(*draws)

    def combined(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """The combined iteration by autograd, which is no provider of its own."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.tf32):
            return self.loop.combined_iteration(draws)


class PlainNoTF32(PlainTraining):
    """The published loop in true float32."""

    tf32 = False


class CompiledTraining(PlainTraining):
    """The published loop, its networks compiled, channels_last and under bf16 autocast."""

    dtype = "bfloat16"
    autocast = torch.bfloat16
    backend = "inductor"

    def __init__(self, name: str, case: TrainingCase) -> None:
        super().__init__(name, case)
        torch._dynamo.reset()
        for net in self.networks:
            net.compile(backend=self.backend, dynamic=False)
        self.networks = ()

    def network(self) -> Any:
        return super().network().to(memory_format=torch.channels_last)


class LibraryTraining(TrainingProvider):
    """The library's trainer."""

    update = "alternating"

    def __init__(self, name: str, case: TrainingCase) -> None:
        # here, not above: a process that trains the plain loop is not to hold the trainer
        from sign_fast.distill.settings import DistillSettings
        from sign_fast.distill.trainer import Distiller

        super().__init__(name, case)
        self.dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[case.precision]
        settings = DistillSettings(
            method=case.method,
            teacher=case.teacher,
            update=self.update,
            batch=case.batch,
            dropout=case.dropout,
            precision=case.precision,
            capture=case.capture,
            lr=case.lr,
            eps=case.eps,
            seed=case.seed,
        )
        self.trainer = Distiller(settings, None, torch.device(case.device))
        nets = self.trainer.networks
        self.networks = (nets.teacher, nets.fake, nets.student, nets.ema)

    def iteration(self) -> dict[str, Tensor]:
        return self.trainer.step()


class CombinedTraining(LibraryTraining):
    """The library's trainer with one forward of student and fake score for both losses."""

    update = "combined"


PROVIDERS: dict[str, type[TrainingProvider]] = {
    "plain": PlainTraining,
    "plain_no_tf32": PlainNoTF32,
    "compile": CompiledTraining,
    "sign_fast": LibraryTraining,
    "sign_fast_combined": CombinedTraining,
}


def make(name: str, case: TrainingCase) -> TrainingProvider:
    """The provider of that name.

    Raises:
        SignFastError: there is none.
    """
    if name not in PROVIDERS:
        raise SignFastError(f"unknown provider {name!r}: known: {', '.join(PROVIDERS)}")
    return PROVIDERS[name](name, case)


@dataclass
class Passes:
    """Passes through networks, each worth about one forward: a backward is one to the inputs, one to the weights."""

    forward: int = 0
    to_inputs: int = 0
    to_weights: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.to_inputs + self.to_weights


@contextmanager
def counted(networks: Sequence[nn.Module]) -> Iterator[Passes]:
    """Count passes through these networks by hooks on their outputs and on one weight of each."""
    passes = Passes()

    def weights(grad: Tensor) -> None:
        passes.to_weights += 1

    def inputs(grad: Tensor) -> None:
        passes.to_inputs += 1

    def forward(module: nn.Module, arguments: Any, output: Tensor) -> None:
        passes.forward += 1
        if output.requires_grad:
            output.register_hook(inputs)

    handles: list[Any] = []
    for net in networks:
        handles.append(net.register_forward_hook(forward))
        weight = max(net.parameters(), key=lambda p: p.numel())
        trained = weight.requires_grad
        handles.append(weight.requires_grad_(True).register_hook(weights))  # only what is trainable takes a hook
        weight.requires_grad_(trained)
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def passes_of(name: str, case: TrainingCase) -> int | None:
    """Passes of the provider's iteration, counted at a few images and outside of CUDA graphs; None for compile."""
    provider = make(name, replace(case, batch=COUNTED_BATCH, capture=False))
    if not provider.networks:
        return None
    with counted(provider.networks) as passes:
        provider()
    return passes.total


def child_main() -> None:
    """Run in a fresh process: resident memory at its peak after three iterations of the provider named in argv."""
    request = json.loads(sys.argv[1])
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    try:
        provider = make(request["name"], TrainingCase(**request["case"]))
    except SignFastError as error:
        sys.exit(str(error))
    for _ in range(request["iterations"]):
        provider.iteration()
    print(json.dumps({"peak_mb": cold.peak_rss_mb()}))


def resident_peak_mb(name: str, case: TrainingCase, iterations: int, timeout: float, threads: int | None) -> float:
    """Peak of resident memory of a process that only trains with this provider, in MiB.

    Raises:
        RuntimeError: it failed or ran into the time limit.
    """
    request = {"name": name, "case": asdict(case), "iterations": iterations, "threads": threads}
    program = "import benchmarks.training_providers as t; t.child_main()"
    return cold.in_fresh_process(program, request, timeout)["peak_mb"]


def allocated_peak_mb(device: str, work: Callable[[], TrainingProvider]) -> tuple[TrainingProvider, float]:
    """What `work` makes, and how far it raised the memory that torch's allocator holds on the CUDA device, in MiB."""
    gc.collect()  # nothing is to be freed meanwhile that was here before
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = work()
    torch.cuda.synchronize(device)
    return made, (torch.cuda.max_memory_allocated(device) - before) / 2**20

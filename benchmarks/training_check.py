"""Whether an iteration of the library's trainer does what ordinary autograd does: otherwise its time says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain_distill import StepDraws
from benchmarks.training_providers import PROVIDERS, LibraryTraining, PlainNoTF32, TrainingCase
from sign_fast.checkpoints.store import find, read_config
from sign_fast.distill.draws import Draws, Stream

# what the plain loop and the library's trainer have to agree in: 2e-4 is the golden numbers' bound for gradients
AGREEMENT = 2e-4
CHECKED_BATCH = 32
CHECKED_CPU_PIXELS = 32 * 8 * 8
CHECKED_FROM = 20  # iterations, of which the average's ramp makes a half-life of one: it then shows both its parts
SMOOTH: dict[str, Any] = {
    "lr": 0.1,
    "eps": 1e3,
}  # Adam with gradients' sizes, not their signs, which rounding may decide


def draws_of(case: TrainingCase, iteration: int, shape: tuple[int, int, int], label_dim: int) -> list[StepDraws]:
    """The trainer's draws of an iteration as the plain loop takes them: (fake score's step, generator's step)."""
    draws = Draws(Draws.seeds_at(case.seed, iteration, 0, case.batch).to(case.device))
    fake = StepDraws(
        draws.normal(Stream.FAKE_LATENT, shape),
        draws.normal(Stream.FAKE_LEVEL, (1, 1, 1)),
        draws.normal(Stream.FAKE_NOISE, shape),
        draws.labels(Stream.FAKE_LABEL, label_dim),
    )
    generator = StepDraws(
        draws.normal(Stream.STUDENT_LATENT, shape),
        draws.uniform(Stream.STUDENT_LEVEL),
        draws.normal(Stream.STUDENT_NOISE, shape),
        draws.labels(Stream.STUDENT_LABEL, label_dim),
    )
    return [fake, generator]


def check(case: TrainingCase, names: Sequence[str] = ("sign_fast", "sign_fast_combined")) -> str:
    """Empty if the library's iterations do what ordinary autograd does, else what they do otherwise.

    From equal weights and draws, in float32 and without dropout, in two iterations: the losses, and every weight of
    fake score, student and average. The alternating iteration is the published one; the combined one, which draws
    other noise levels for the fake score, is compared with `PlainSiD.combined_iteration`.

    Args:
        case: what is timed. Compared are up to `CHECKED_BATCH` images; on a CPU fewer large ones, see `checked_batch`.
        names: of providers; those of the library are compared.
    """
    for name in names:
        if issubclass(PROVIDERS[name], LibraryTraining) and (wrong := _difference(name, case)):
            return f"{name}: {wrong}"
    return ""


def checked_batch(case: TrainingCase, side: int) -> int:
    """Images that `check` compares.

    32 take the convolutions that the timed batch takes. On a CPU as many as have the pixels of 32 digits, but 4 at
    least: with those the whole check costs as many passes as one iteration of 32 images, with 32 as eight.
    """
    most = CHECKED_BATCH
    if not case.device.startswith("cuda"):
        most = min(most, max(4, CHECKED_CPU_PIXELS // side**2))
    return min(case.batch, most)


def _difference(name: str, case: TrainingCase) -> str:
    """What the library's provider does otherwise than the plain loop, empty if nothing."""
    side = read_config(find(case.teacher))["kwargs"]["img_resolution"]
    case = replace(case, batch=checked_batch(case, side), precision="fp32", dropout=0.0, capture=False, **SMOOTH)
    plain, ours = PlainNoTF32("plain", case), PROVIDERS[name](name, case)
    assert isinstance(ours, LibraryTraining)
    loop, trainer = plain.loop, ours.trainer
    nets = trainer.networks
    move_apart([loop.fake.net, nets.fake], case.seed)
    sides = {
        "the fake score": (loop.fake.net, nets.fake),
        "the student": (loop.student.net, nets.student),
        "the average": (loop.ema.net, nets.ema),
    }
    begun = {role: [p.detach().clone() for p in net.parameters()] for role, (net, _) in sides.items()}
    trainer.iteration, loop.images_seen = CHECKED_FROM, CHECKED_FROM * case.batch
    shape = (nets.teacher.img_channels, side, side)
    for i in range(CHECKED_FROM, CHECKED_FROM + 2):
        fake, generator = draws_of(case, i, shape, nets.teacher.label_dim)
        expected = plain.combined(generator) if ours.update == "combined" else plain.iteration(fake, generator)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = ours.iteration()
        for loss, value, scale in zip(("loss_fake", "loss_student"), expected, (1, loop.student_scale), strict=True):
            error = abs(float(found[loss]) * scale / float(value) - 1)
            if not error <= AGREEMENT:
                return f"{loss} is off by {error:.1e} of the plain loop's, {AGREEMENT:.0e} is allowed"
        for role, (one, other) in sides.items():
            if wrong := _moved_elsewhere(one, other, begun[role]):
                return f"{wrong} of {role}"
    return ""


@torch.no_grad()
def _moved_elsewhere(one: nn.Module, other: nn.Module, begun: Sequence[Tensor]) -> str:
    """The weight of the second network that moved otherwise than the first's, empty if none did.

    Root mean squares of a weight's values: the error against the movement of the weight itself, to which goes a
    hundredth of the largest (some have no gradient but rounding), and the rounding of the weight that is moved.
    """
    moved = [float((p - start).square().mean().sqrt()) for p, start in zip(one.parameters(), begun, strict=True)]
    others = dict(other.named_parameters())
    for (name, p), start, distance in zip(one.named_parameters(), begun, moved, strict=True):
        error = float((p - others[name]).square().mean().sqrt())
        rounding = 2 * torch.finfo(torch.float32).eps * float(start.abs().max())
        if not error <= AGREEMENT * (distance + 0.01 * max(moved)) + rounding:
            return f"{name}, which moves by {distance:.1e}, is off by {error:.1e}"
    return "" if max(moved) > 0 else "no weight"


@torch.no_grad()
def move_apart(fakes: Sequence[nn.Module], seed: int) -> None:
    """Change each fake score by the same tenth: of copies of the teacher the student would see rounding only."""
    for parameters in zip(*(net.parameters() for net in fakes), strict=True):
        seed += 1
        generator = torch.Generator().manual_seed(seed)
        factor = 1 + 0.1 * torch.randn(parameters[0].shape, generator=generator).to(parameters[0].device)
        for p in parameters:
            p.mul_(factor)

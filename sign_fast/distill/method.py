"""What a method of distillation computes in an iteration, and what it is given for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from .draws import Draws
from .trained import Trained

if TYPE_CHECKING:
    from typing_extensions import Self

Losses = dict[str, Tensor]
"""Per-sample sums (n,) float32 by name; their total is what is minimised."""


@dataclass(frozen=True)
class Step:
    """One process's part of an iteration, or a chunk of it.

    Args:
        draws: its random numbers.
        call: which call of the student is trained, 1 … K.
        images, labels: (n, C, H, W) real images and (n, label_dim) one-hot rows, or None.
        idem: the ramp of SIGN's idempotence term, in [0, 1]; a tensor, which a CUDA graph reads anew.
        adversarial: whether SiDA's adversarial terms are on.
        pairs: the teacher's (z, y, labels) for the regression term, of each call where there are several, or None.
        closeness: SiDA's mean 1/ω of the whole batch where this is a chunk of it; None: this step's, over processes.
    """

    draws: Draws
    call: int = 1
    images: Tensor | None = None
    labels: Tensor | None = None
    idem: Tensor | float = 1.0
    adversarial: bool = False
    pairs: tuple[Tensor, Tensor, Tensor | None] | None = None
    closeness: Tensor | None = None

    def part(self, chunk: slice) -> Self:
        """That of some of the samples."""
        pairs = self.pairs
        return dataclasses.replace(
            self,
            draws=self.draws.part(chunk),
            images=_cut(self.images, chunk),
            labels=_cut(self.labels, chunk),
            pairs=None if pairs is None else (pairs[0][chunk], pairs[1][chunk], _cut(pairs[2], chunk)),
        )

    def repeated(self, repeat: int) -> Self:
        """What the fake score's update number `repeat` of the iteration is given."""
        return dataclasses.replace(self, draws=self.draws.repeated(repeat))


def _cut(t: Tensor | None, chunk: slice) -> Tensor | None:
    return None if t is None else t[chunk]


class Method(Protocol):
    """Losses of one iteration. `fake` and `student` are called as the networks are."""

    clip: float | None
    """Limit of each gradient value of the fake score, or None."""

    def fake_losses(self, fake: Trained, step: Step) -> Losses:
        """Of the fake score; the student is frozen."""

    def student_losses(self, student: Trained, step: Step) -> Losses:
        """Of the student; the fake score is frozen."""

    def combined_backward(self, fake: Trained, student: Trained, step: Step) -> Losses:
        """Both losses from one forward of each network, and their backward passes into .grad.

        The sums are taken times the networks' factors, and scaled by their scalers.

        Returns:
            The detached losses.
        """


def set_mode(net: nn.Module, training: bool) -> None:
    """train() or eval(), where it is not so already."""
    if net.training != training:
        net.train(training)

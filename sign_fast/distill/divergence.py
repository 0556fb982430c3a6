"""When to stop a run that has gone astray."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SignFastError
from .parallel import local


@torch.no_grad()
def all_finite(*networks: nn.Module) -> Tensor:
    """Whether all parameters and floating buffers are finite: a bool tensor on their device, not waited for.

    Of sharded networks it is about this process's shards.
    """
    held = local([t for net in networks for t in (*net.parameters(), *net.buffers())])
    states = [t for t in held if t.is_floating_point() and t.numel()]
    # the largest magnitude, as sums of squares overflow where weights do not
    return torch.nn.utils.get_total_norm(states, norm_type=math.inf).isfinite()


class DivergenceGuard:
    """Says when to stop: quality worse than factor × its best for `patience` checks in a row, or numbers not finite.

    ::

        stop = guard.check(iteration, quality(images), finite=bool(all_finite(student)))
        if guard.is_best:
            save_best()
        if stop:
            raise SignFastError(stop)

    Args:
        factor: k > 1.
        patience: checks in a row, at least 1.
        figure: what quality is called in its lines.

    Attributes:
        best, best_iteration: the lowest quality so far, None before the first.
        is_best: whether the last check was the best so far.

    Raises:
        SignFastError: factor or patience out of range.
    """

    def __init__(self, factor: float = 3.0, patience: int = 3, figure: str = "quality") -> None:
        if not factor > 1:
            raise SignFastError(f"the divergence factor must be above 1, not {factor}")
        if patience < 1:
            raise SignFastError(f"the divergence patience must be at least 1 check, not {patience}")
        self.factor = factor
        self.patience = patience
        self.figure = figure
        self.best: float | None = None
        self.best_iteration: int | None = None
        self.is_best = False
        self._worse = 0

    @property
    def limit(self) -> float | None:
        """The quality above which a check counts against the run, None before the first."""
        return None if self.best is None else self.factor * self.best

    def check(self, iteration: int, quality: float | None = None, finite: bool = True) -> str:
        """Why the run has to stop, in one line, or "" to go on.

        Args:
            iteration: of the check.
            quality: the lower the better and at least 0; None where it was not measured.
            finite: whether weights and losses are.
        """
        self.is_best = False
        if not finite:
            return f"weights or losses are not finite at iteration {iteration}: {self._remedy()}"
        if quality is None:
            return ""
        if not math.isfinite(quality):
            return f"the {self.figure} is {quality} at iteration {iteration}: {self._remedy()}"
        if self.best is None or quality < self.best:
            self.best, self.best_iteration, self.is_best = quality, iteration, True
        self._worse = self._worse + 1 if quality > self.factor * self.best else 0
        if self._worse < self.patience:
            return ""
        checks = "1 check" if self._worse == 1 else f"{self._worse} checks"
        return (
            f"the run diverges: {self.figure} {quality:.4g} at iteration {iteration}, for {checks} worse than "
            f"{self.factor:g} × its best: {self._remedy()}"
        )

    def _remedy(self) -> str:
        kept = "" if self.best is None else f"; the best was {self.best:.4g} at iteration {self.best_iteration}"
        return f"lower the learning rate, or use fp32{kept}"

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; factor and patience are settings, which a resumed run may change."""
        return {"best": self.best, "best_iteration": self.best_iteration, "worse": self._worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s."""
        self.best, self.best_iteration, self._worse = state["best"], state["best_iteration"], state["worse"]
        self.is_best = False

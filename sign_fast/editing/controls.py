"""What an edit is compared with at equal cost: the teacher's SDEdit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SignFastError
from ..sampling.edm import karras_sigmas
from ..sampling.loop import Correction
from ..sampling.plan import Call, Combine, Levels, Plan, Step, terms
from ..sampling.requests import Labels, Output, is_time_free
from .projection import check_edit, engine_of, noise_levels

Solver = Literal["euler", "heun"]


@lru_cache(maxsize=128)
def sdedit_plan(sigmas: tuple[float, ...], solver: Solver = "euler") -> Plan:
    """x = y + σ_0·ε, then the teacher's probability-flow ODE from σ_0 to 0 (SDEdit); draw 0 is y, draw 1 ε.

    Euler makes a call a step, Heun two but for the last step. Both end with the denoised image of the last call.

    Args:
        sigmas: σ_0 > σ_1 > …, positive; 0 follows.
        solver: of the ODE.
    """
    levels = Levels()
    x, denoised, corrected = range(3)
    steps: list[Step] = [Combine(x, (), ((0, 1.0), (1, sigmas[0])))]
    for sigma, following in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        ratio = following / sigma
        steps.append(Call(denoised, x, levels.number(sigma)))
        steps.append(Combine(x, terms((x, ratio), (denoised, 1 - ratio))))
        if solver == "heun" and following > 0:
            half = 0.5 * (1 / ratio - 1)
            steps.append(Call(corrected, x, levels.number(following)))
            steps.append(Combine(x, terms((x, 1.0), (corrected, half), (denoised, -half))))
    return Plan(tuple(steps), levels.values(), draws=2, registers=3, result=x, noise_dtype=torch.float32)


def sdedit_sigmas(
    noise_level: float,
    calls: int,
    solver: Solver = "euler",
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    round_sigma: Callable[[Tensor], Tensor] = torch.as_tensor,
) -> tuple[float, ...]:
    """The noise levels of `calls` network calls: EDM's schedule (ρ = 7) from σ_0 = τ0/(1 − τ0) down, its end left out.

    A schedule of few steps must not spend its last call at sigma_min, where there is nothing left to denoise: of one
    level more, the last is dropped, and the last step goes from the one before it to 0.

    Args:
        noise_level: τ0 in [0, 1]; σ_0 is kept within sigma_min and sigma_max.
        calls: of the teacher; odd for Heun.
        solver: of the ODE.
        sigma_min, sigma_max, round_sigma: the teacher's.

    Raises:
        SignFastError: calls < 1, or even for Heun.
    """
    if calls < 1 or (solver == "heun" and calls % 2 == 0):
        raise SignFastError(
            f"{solver} cannot make {calls} network calls" + (": give an odd number" if calls > 0 else "")
        )
    (tau,) = noise_levels(noise_level, 0)
    lowest, highest = max(0.002, sigma_min), min(80.0, sigma_max)
    first = highest if tau == 1 else min(max(tau / (1 - tau), lowest), highest)
    steps = calls if solver == "euler" else (calls + 1) // 2
    sigmas: list[float] = round_sigma(karras_sigmas(steps + 1, lowest, first, 7)[:-1]).tolist()
    return tuple(dict.fromkeys(sigmas))  # a network of few levels, or τ0 near 0, makes steps equal


def sdedit(
    teacher: Any,
    images: Tensor,
    *,
    noise_level: float,
    calls: int,
    solver: Solver = "euler",
    constraint: Correction | None = None,
    labels: Labels = None,
    seeds: Iterable[int] | None = None,
    output: Output = "float",
) -> Tensor:
    """SDEdit with a teacher: noise at σ_0 = τ0/(1 − τ0), then back along the probability-flow ODE.

    With the same seeds the teacher starts from `project`'s own u, scaled by 1/(1 − τ0), and the constraint puts back
    what is known into every denoised image, so that the two differ in nothing but the network.

    Args:
        teacher: an `ImageGenerator` or `Engine` of a denoiser, or a denoiser.
        noise_level: τ0 in [0, 1].
        calls: of the teacher, at most; a project with k rounds makes k + 1 calls.
        solver: "euler", or "heun", which makes an odd number of calls.
        images, constraint, labels, seeds, output: as in `project`.

    Returns:
        As `project`.

    Raises:
        SignFastError: an argument is wrong; nothing has been computed then.
    """
    engine = engine_of(teacher)
    if is_time_free(engine.net):
        raise SignFastError("SDEdit needs a teacher, a network with a noise level: this one takes none")
    net = engine.net
    names = ("sigma_min", "sigma_max", "round_sigma")
    known = {name: getattr(net, name) for name in names if hasattr(net, name)}
    plan = sdedit_plan(sdedit_sigmas(noise_level, calls, solver, **known), solver)
    numbers, classes = check_edit(engine, images, seeds, labels, constraint, output)
    return engine.edit(plan, images, numbers, classes, constraint, output)

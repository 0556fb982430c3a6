"""Tables and plots of the toy mixtures: teacher, student at k = 1 … 4, and the student without each term."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sign_fast.distill.pairs import network_hash
from sign_fast.training.seeds import generator_for

from . import toy
from .arms import WHOLE, Results, arms_of, described, environment, over_seeds
from .measure import iterates, moves, rms
from .plots import save_figure

_TRUE, _DATA, _CORRUPTION = 21, 22, 23  # streams of random numbers
STEPS = 4
_SHOWN = 2000  # points in a picture
CORRUPTION = 0.2
"""t of the corrupted points u = (1 − t)x + t·ε."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long the toy runs are.

    Args:
        teacher: iterations of 512 samples.
        student: iterations of 256 samples.
        samples: that the figures are of.
    """

    teacher: int = 4000
    student: int = 2000
    samples: int = 10_000


def _figures(samples: Tensor, modes: toy.Modes) -> dict[str, Any]:
    return dataclasses.asdict(toy.coverage(samples, modes))


def _student_rows(student: toy.Student, modes: toy.Modes, z: Tensor, x: Tensor) -> list[dict[str, Any]]:
    """A row for each k, with ‖f^{k+1} − f^k‖ from noise and from data and ‖f^k(x) − x‖."""
    from_noise, from_data = (iterates(student, u, None, STEPS + 1) for u in (z, x))
    noise_moves, data_moves = moves(from_noise), moves(from_data)
    return [
        {
            "steps": k,
            "calls": k,
            **_figures(from_noise[k], modes),
            "move_noise": noise_moves[k],
            "move_data": data_moves[k],
            "reconstruction": rms(from_data[k], x),
        }
        for k in range(1, STEPS + 1)
    ]


def report(
    name: str,
    sizes: Sizes,
    seeds: Sequence[int],
    ablation: bool,
    folder: Path,
    say: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one mixture, means over seeds with their standard deviations under "spread", and the pictures' names.

    Writes toy-NAME.png and, with the ablation, toy-NAME-arms.png, of the first seed; finished arms are kept in
    toy-NAME-arms.json.

    Args:
        name: in `toy.DENSITIES`.
        sizes: of the runs.
        seeds: of all draws.
        ablation: run every arm of `arms_of` the settings, not the first only.
        folder: for the files.
        say: told what is being done.
    """
    of_seeds = [_of_seed(name, sizes, seed, ablation, folder, say) for seed in seeds]
    rows = []
    for runs in zip(*(found for found, _ in of_seeds), strict=True):
        places = sorted({described(run["environment"]) for run in runs if "environment" in run})
        figures = [{key: value for key, value in run.items() if key != "environment"} for run in runs]
        rows.append({**over_seeds(figures), "seeds": len(runs), "environments": places})
    shown = of_seeds[0][1]
    modes = toy.DENSITIES[name]()
    pictures = [f"toy-{name}.png"]
    _plot(folder / pictures[0], modes, shown)
    if ablation:
        pictures.append(f"toy-{name}-arms.png")
        _plot_arms(folder / pictures[1], modes, shown.arms)
    return rows, pictures


@dataclasses.dataclass
class _Points:
    """What the pictures of a seed show.

    Args:
        x, sampled: the mixture's and the teacher's.
        outputs: of the student with all terms, k = 1 … 4.
        corrupted, projected: u and f(u).
        arms: f(z) of each arm.
    """

    x: Tensor
    sampled: Tensor
    outputs: list[Tensor]
    corrupted: Tensor
    projected: Tensor
    arms: dict[str, Tensor]


def _of_seed(
    name: str, sizes: Sizes, seed: int, ablation: bool, folder: Path, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], _Points]:
    modes, cpu = toy.DENSITIES[name](), torch.device("cpu")
    say(f"toy, {modes.name}, seed {seed}: teacher")
    place = environment(cpu)
    start = time.perf_counter()
    teacher = toy.train_teacher(modes, sizes.teacher, seed)
    teacher_seconds = time.perf_counter() - start
    z = toy.latents(sizes.samples, seed)
    x = modes.draw(sizes.samples, generator_for(cpu, seed, _DATA))
    sampled = toy.teacher_samples(teacher, z)
    common = {"density": modes.name}
    rows: list[dict[str, Any]] = [
        {
            **common,
            "name": "true samples",
            **_figures(modes.draw(sizes.samples, generator_for(cpu, seed, _TRUE)), modes),
        },
        {**common, "name": "identity", "calls": 0, **_figures(z, modes)}
        | {"move_noise": 0.0, "move_data": 0.0, "reconstruction": 0.0},
        {**common, "name": "teacher, 18 Heun steps", "steps": 18, "calls": 35, **_figures(sampled, modes)}
        | {"seconds": teacher_seconds, "environment": place},
    ]
    results = Results(folder / f"toy-{name}-arms.json")
    base = toy.settings(sizes.student, seed)
    made: list[tuple[toy.Pairs | None, float]] = []  # the pairs that all arms share, and what they took
    arms: dict[str, Tensor] = {}
    for arm, changes in arms_of(base).items() if ablation else [(WHOLE, {})]:
        chosen = dataclasses.replace(base, **changes)

        def run(arm: str = arm, chosen: Any = chosen) -> dict[str, Any]:
            say(f"toy, {modes.name}, seed {seed}: {arm}")
            if chosen.needs_pairs and not made:
                start = time.perf_counter()
                made.append((toy.pairs_of(teacher, chosen), time.perf_counter() - start))
            pairs, sampling = made[0] if chosen.needs_pairs else (None, None)
            start = time.perf_counter()
            student = toy.distil(teacher, modes, chosen, pairs)
            times = {"seconds": time.perf_counter() - start, "sampling_seconds": sampling}
            outputs = iterates(student, z[:_SHOWN], None, STEPS)[1:]
            return {
                "rows": [{**row, **times} for row in _student_rows(student, modes, z, x)],
                "corruption": _corrupted(student, modes, x, seed),
                "points": [_numbers(found) for found in (outputs if arm == WHOLE else outputs[:1])],
                "projected": _numbers(iterates(student, _corrupt(x, seed)[:_SHOWN], None, 1)[1]),
            }

        facts = {
            **dataclasses.asdict(chosen),
            **dataclasses.asdict(sizes),
            "std": modes.std,
            "teacher_hash": network_hash(teacher),
        }
        found = results.get(arm, facts, place, run)
        points = [torch.tensor(numbers)[..., None, None] for numbers in found["points"]]
        arms[arm] = points[0]
        if arm == WHOLE:
            outputs, projected = points, torch.tensor(found["projected"])[..., None, None]
        rows += [{**common, "name": arm, **row, "environment": found["environment"]} for row in found["rows"]]
        rows[-1] |= {"corruption": found["corruption"]}
    return rows, _Points(x, sampled, outputs, _corrupt(x, seed)[:_SHOWN], projected, arms)


def _numbers(points: Tensor) -> list[list[float]]:
    return [[round(float(value), 3) for value in point] for point in points.flatten(1)]


def _corrupt(x: Tensor, seed: int) -> Tensor:
    noise = torch.randn(x.shape, generator=generator_for(torch.device("cpu"), seed, _CORRUPTION))
    return (1 - CORRUPTION) * x + CORRUPTION * noise


def _corrupted(student: toy.Student, modes: toy.Modes, x: Tensor, seed: int) -> dict[str, float]:
    """The share of high quality of corrupted points, and of f of them."""
    u = _corrupt(x, seed)
    before, after = (toy.coverage(points, modes).high_quality for points in (u, iterates(student, u, None, 1)[1]))
    return {"before": before, "after": after}


# ---- plots ----


def _scatter(axis: Any, points: Tensor, modes: toy.Modes, title: str, colour: str = "#2b7de9") -> None:
    from matplotlib.patches import Circle

    flat = points.flatten(1)[:_SHOWN]
    axis.scatter(flat[:, 0], flat[:, 1], s=2, alpha=0.4, color=colour, lw=0)
    for centre in modes.centres.tolist():
        axis.add_patch(Circle(centre, toy.HIGH_QUALITY * modes.std, fill=False, ec="#d93025", lw=0.5))
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def _plot(path: Path, modes: toy.Modes, shown: _Points) -> None:
    """Data, teacher, f at k = 1 … 4, corrupted points, and f of them with the way they went."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 6.2), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    _scatter(axes[0], shown.x, modes, "true samples", "#5f6368")
    _scatter(axes[1], shown.sampled, modes, "teacher, 35 calls", "#188038")
    for k, output in enumerate(shown.outputs, 1):
        _scatter(axes[1 + k], output, modes, f"student, k = {k}")
    _scatter(axes[6], shown.corrupted, modes, f"u = {1 - CORRUPTION:g}·x + {CORRUPTION:g}·ε", "#e8710a")
    ways = torch.stack([shown.corrupted.flatten(1), shown.projected.flatten(1)], 1)[:400].numpy()
    axes[7].add_collection(LineCollection(list(ways), colors="#e8710a", lw=0.3, alpha=0.5))
    _scatter(axes[7], shown.projected, modes, "f(u), and where it came from")
    title = f"{modes.name} modes; circles: {toy.HIGH_QUALITY:g} standard deviations"
    save_figure(figure, path, title)


def _plot_arms(path: Path, modes: toy.Modes, points: dict[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    columns = 4
    lines = -(-len(points) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (arm, found) in zip(axes, points.items(), strict=False):
        _scatter(axis, found, modes, arm)
    for axis in axes[len(points) :]:
        axis.remove()
    save_figure(figure, path, f"{modes.name} modes, one step, leaving one term out")

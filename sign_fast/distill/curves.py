"""curves.png of a run, drawn from its metrics.csv and quality.csv."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.atomic import write_atomically
from .quality import IDEMPOTENCE_COLUMNS

WITHOUT_MATPLOTLIB = "curves.png is off: pip install 'sign-fast[train]'"
SIGN_TERMS = ("rec", "idem", "flow", "dmd", "sid", "reg")
"""Columns of metrics.csv that are losses too, the terms of SIGN."""
_COLOURS = ("#2b7de9", "#e8710a", "#188038", "#9334e6", "#d93025", "#12a4af", "#5f6368", "#b06000")
_STOP_COLOUR = "#d93025"
_SHARED_COLOUR = "#5f6368"
_WIDE_RANGE = 5  # largest to smallest value of a panel from which a logarithmic axis reads better
_SMOOTHED_OVER = 50  # parts of the run, one of which the running mean takes in

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Line:
    """One column of a table.

    Args:
        column: its name in the CSV file.
        label: in the legend.
        x, y: iterations and values, NaN where there is none.
    """

    column: str
    label: str
    x: Values
    y: Values


@dataclass(frozen=True)
class Panel:
    """Lines that belong together.

    Args:
        title: over the panel.
        lines: those of the run, at least one.
        smooth: the values are of single batches: show their running mean over them.
    """

    title: str
    lines: tuple[Line, ...]
    smooth: bool = False


def read_table(path: Path) -> dict[str, Values]:
    """The columns of a CSV file as float64, NaN where a cell is no number; empty where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    whole = [row for row in rows if len(row) == len(header)]
    return {name: np.array([_number(row[i]) for row in whole], np.float64) for i, name in enumerate(header)}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def panels(metrics: Mapping[str, Values], quality: Mapping[str, Values]) -> list[Panel]:
    """What there is to draw, by the names of the columns.

    metrics: "loss…", `SIGN_TERMS`, "grad_norm…". quality: "quality…" ("quality_4" is of 4 steps), "score_gap_SIGMA" or
    "score_gap_tTIME", "latents…", `IDEMPOTENCE_COLUMNS`.
    """

    def lines(table: Mapping[str, Values], names: Mapping[str, str]) -> tuple[Line, ...]:
        found = [Line(name, label, table["iteration"], table[name]) for name, label in names.items() if name in table]
        return tuple(line for line in found if np.isfinite(line.y).any())

    def starting(table: Mapping[str, Values], prefix: str) -> dict[str, str]:
        names = [name for name in table if name.startswith(prefix)]
        return {name: name.removeprefix(prefix).strip("_").replace("_", " ") or prefix for name in names}

    gaps = {
        name: f"t = {label[1:]}" if label.startswith("t") else f"σ = {label}"
        for name, label in starting(quality, "score_gap").items()
    }
    qualities = {
        name: f"{label} step{'s' * (label != '1')}" if label.isdecimal() else label
        for name, label in starting(quality, "quality").items()
    }
    losses = lines(metrics, {name: name for name in SIGN_TERMS} | starting(metrics, "loss"))
    signed = tuple(line for line in losses if np.nanmin(line.y) < 0)  # a logarithmic axis would lose those beside it
    idempotence = ["f(f(z)) − f(z), noise", "f(f(x)) − f(x), data", "f(x) − x, data"]
    found = [
        Panel("Quality of the EMA (lower is better)", lines(quality, qualities)),
        Panel("Score gap, RMS of y_real − y_fake", lines(quality, gaps)),
        Panel(
            "Idempotence and reconstruction, RMS",
            lines(quality, dict(zip(IDEMPOTENCE_COLUMNS, idempotence, strict=True))),
        ),
        Panel("Latents of the EMA", lines(quality, starting(quality, "latents"))),
        Panel("Losses", tuple(line for line in losses if line not in signed), smooth=True),
        Panel("Losses that change sign (no measure of quality)", signed, smooth=True),
        Panel("Gradient norms", lines(metrics, starting(metrics, "grad_norm")), smooth=True),
    ]
    return [panel for panel in found if panel.lines]


def draw_curves(
    folder: Path, goals: Mapping[str, float] | None = None, stop_above: float | None = None, title: str = ""
) -> str:
    """Draw curves.png from metrics.csv and quality.csv; whole or not at all, and nothing where nothing is logged.

    Args:
        folder: of the run.
        goals: values to reach by column, e.g. {"quality": 6.0}, drawn as dashed lines.
        stop_above: the quality at which the run stops, `DivergenceGuard.limit`.
        title: over all.

    Returns:
        "", or without matplotlib the line that says how to get it.

    Raises:
        SignFastError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return WITHOUT_MATPLOTLIB
    shown = panels(read_table(folder / "metrics.csv"), read_table(folder / "quality.csv"))
    if not shown:
        return ""
    rows = -(-len(shown) // 2)
    # a Figure of its own, not pyplot's: no global state, and it draws with Agg whatever the backend
    figure = Figure(figsize=(5.6 * min(2, len(shown)), 0.3 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, min(2, len(shown)), squeeze=False).flatten()
    for axis, panel in zip(axes, shown, strict=False):
        _draw(axis, panel, goals or {}, stop_above)
    for axis in axes[len(shown) :]:
        axis.remove()
    figure.suptitle(title, fontsize=10)
    write_atomically(
        folder / "curves.png", lambda temporary: figure.savefig(temporary, format="png", dpi=110), durable=False
    )
    return ""


def _draw(axis: Any, panel: Panel, goals: Mapping[str, float], stop_above: float | None) -> None:
    is_quality, is_gap = panel.title.startswith("Quality"), panel.title.startswith("Score")
    reached: defaultdict[float, list[Any]] = defaultdict(list)  # colours of the lines by their goal
    for i, line in enumerate(panel.lines):
        colour = _sequential(i, len(panel.lines)) if is_gap else _COLOURS[i % len(_COLOURS)]
        label, style = line.label, {"color": colour, "lw": 1.5}
        few = np.isfinite(line.y).sum() < 40
        mean = running_mean(line.y, len(line.y) // _SMOOTHED_OVER) if panel.smooth else line.y
        if panel.smooth and not few:
            axis.plot(line.x, line.y, color=colour, lw=0.6, alpha=0.3)
        if is_quality:
            best = int(np.nanargmin(line.y))
            axis.plot(line.x[best], line.y[best], "*", ms=12, color=colour, mec="white", zorder=4)
            label += f", best {line.y[best]:.4g} at {int(line.x[best]):,}"
        axis.plot(line.x, mean, label=label, marker="o" if few else "", ms=2.5, **style)
        if line.column in goals:
            reached[goals[line.column]].append(colour)
    for goal, colours in reached.items():
        colour = colours[0] if len(colours) == 1 else _SHARED_COLOUR
        axis.axhline(goal, color=colour, lw=1, ls="--", label=f"goal {goal:g}")
    if is_quality and stop_above is not None:
        axis.axhline(stop_above, color=_STOP_COLOUR, lw=1, ls=":", label=f"stops above {stop_above:.4g}")
    _scale(axis, np.concatenate([line.y for line in panel.lines]))
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("iteration", fontsize=8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.tick_params(labelsize=8)
    axis.grid(True, color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def _scale(axis: Any, values: Values) -> None:
    """A logarithmic axis where the values span a wide range, symmetric about 0 where some are negative."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(size) or size.max() < _WIDE_RANGE * np.quantile(size, 0.05):
        return
    if np.nanmin(values) < 0:
        axis.set_yscale("symlog", linthresh=float(f"{np.quantile(size, 0.75):.0e}"))  # linear where most values are
    else:
        from matplotlib.ticker import LogLocator

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if size.max() < 1000 * size.min() else (1,)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()


def _sequential(index: int, count: int) -> Any:
    """Colours in order, for levels of one quantity."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * index / max(1, count - 1))


def running_mean(values: Values, width: int) -> Values:
    """The mean of the finite values among the `width` before and after and the value itself; NaN where none is."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    first, last = (index - width).clip(min=0), (index + width + 1).clip(max=len(values))
    number = counts[last] - counts[first]
    total = sums[last] - sums[first]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)

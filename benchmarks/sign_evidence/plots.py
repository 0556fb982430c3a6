"""The plots of a network's figures; those of the toy mixtures are in `toy_report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sign_fast.checkpoints.atomic import write_atomically

from .network import Found

_RECURSIVE, _MULTISTEP, _TEACHER, _START, _GREY = "#2b7de9", "#e8710a", "#188038", "#9334e6", "#9aa0a6"


def save_figure(figure: Any, path: Path, title: str) -> None:
    """Whole or not at all."""
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120), durable=False)


def plot_found(folder: Path, found: Found, title: str) -> list[str]:
    """quality.png, moves.png, classes.png and samples.png; the names of those that there are figures for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = ["moves.png", "samples.png"]
    if any("frechet_distance" in row for row in found.rows):
        names += ["quality.png", "classes.png"]
        _plot_quality(folder / "quality.png", found.rows, title)
        _plot_classes(folder / "classes.png", found.classes, title)
    _plot_moves(folder / "moves.png", found, title)
    _plot_samples(folder / "samples.png", found, title)
    return names


def _clean(axis: Any) -> None:
    axis.grid(True, color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _plot_quality(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Fréchet distance over network calls; the first call is common to both samplers of the student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axis = figure.subplots()
    lines = {
        "student, recursive": (_RECURSIVE, "o"),
        "student, multi-step": (_MULTISTEP, "s"),
        "teacher, Heun": (_TEACHER, "^"),
    }
    first = next(row for row in rows if row["name"] == "student, recursive")
    for name, (colour, marker) in lines.items():
        shown = [row for row in rows if row["name"] == name]
        shown = [first, *shown] if name == "student, multi-step" else shown
        x, y = [row["calls"] for row in shown], [row["frechet_distance"] for row in shown]
        axis.plot(x, y, color=colour, marker=marker, ms=5, lw=1.5, label=name)
        for row in shown if name == "teacher, Heun" else ():
            text = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
            axis.annotate(text, (row["calls"], row["frechet_distance"]), (5, 4), textcoords="offset points", fontsize=8)
    for row in rows:
        if row["name"] in ("identity", "constant (mean image)"):
            axis.axhline(row["frechet_distance"], color=_GREY, lw=1, ls="--")
            place = (0.99, row["frechet_distance"])
            transform = axis.get_yaxis_transform()
            axis.text(*place, row["name"], transform=transform, fontsize=8, color="#5f6368", ha="right", va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel="Fréchet distance (lower is better)")
    ticks = [1, 2, 3, 4, 9, 35]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.legend(frameon=False, fontsize=8)
    _clean(axis)
    save_figure(figure, path, title)


def _plot_moves(path: Path, found: Found, title: str) -> None:
    """RMS of f^{k+1} − f^k; the identity's and the constant's are 0, and so not on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, start in zip(figure.subplots(1, 2, sharey=True), ("noise", "data"), strict=True):
        for name, colour in (("student, recursive", _RECURSIVE), ("student before training", _START)):
            values = found.moves[name][start]
            axis.plot(range(len(values)), values, color=colour, marker="o", ms=4, lw=1.5, label=name)
        axis.set(yscale="log", xlabel="k", title="from noise" if start == "noise" else "from held-out data")
        axis.title.set_fontsize(10)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _clean(axis)
        if start == "noise":
            axis.set_ylabel("RMS of $f^{k+1} - f^k$, pixels in [−1, 1]")
            axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path, f"{title} (0 of the identity and of a constant, which generate nothing)")


def _plot_classes(path: Path, classes: dict[str, list[float]], title: str) -> None:
    """The share of each class as the classifier sees it."""
    from matplotlib.figure import Figure

    shown = ["held-out data", "student, recursive, k = 1", "student, recursive, k = 4", "teacher, Heun, k = 18"]
    shown = [name for name in shown if name in classes]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    colours = (_GREY, _RECURSIVE, "#8ab4f8", _TEACHER)
    for i, (name, colour) in enumerate(zip(shown, colours, strict=False)):
        x = np.arange(len(classes[name])) + (i - (len(shown) - 1) / 2) * 0.2
        axis.bar(x, classes[name], 0.19, color=colour, label=name)
    axis.set_xticks(range(len(classes[shown[0]])))
    axis.set(xlabel="class", ylabel="share of images")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    _clean(axis)
    save_figure(figure, path, title)


def _plot_samples(path: Path, found: Found, title: str) -> None:
    """A row of images for each row of the table, the same seeds under each other."""
    from matplotlib.figure import Figure

    names = list(found.grids)
    figure = Figure(figsize=(9, 0.46 * len(names) + 0.4))
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.23, right=0.99, bottom=0.01, top=1 - 0.35 / figure.get_figheight(), hspace=0.06)
    for axis, name in zip(axes, names, strict=True):
        images = found.grids[name].numpy()
        gap = np.full((images.shape[1], 1, images.shape[3]), 255, np.uint8)
        strip = np.concatenate([part for image in images for part in (image, gap)], 1)
        axis.imshow(strip if strip.shape[2] == 3 else strip[:, :, 0], cmap="gray", vmin=0, vmax=255)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    save_figure(figure, path, title)


def plot_ablation(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Quality, idempotence and reconstruction of each arm; whiskers are standard deviations over seeds."""
    from matplotlib.figure import Figure

    panels = {
        "frechet_distance_1": "Fréchet distance, k = 1",
        "idempotence_noise": "RMS of f(f(z)) − f(z)",
        "reconstruction": "RMS of f(x) − x",
        "diversity": "diversity (1: as the data)",
    }
    shown = {column: text for column, text in panels.items() if all(column in row for row in rows)}
    figure = Figure(figsize=(3.1 * len(shown) + 1.2, 0.34 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    names = [row["name"] for row in rows]
    for axis, (column, text) in zip(axes, shown.items(), strict=True):
        values = [row[column] for row in rows]
        spread = [row["spread"].get(column, 0.0) for row in rows]
        colours = [_RECURSIVE if name == "all terms" else _GREY for name in names]
        axis.barh(names, values, color=colours, xerr=spread if any(spread) else None, ecolor="#444444", capsize=2)
        if column.startswith("frechet"):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(text, fontsize=9)
        _clean(axis)
    axes[0].invert_yaxis()
    save_figure(figure, path, title)

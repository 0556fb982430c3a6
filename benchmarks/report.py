"""The table on the screen and the plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sign_fast.checkpoints.atomic import write_atomically

_HEADER = [
    ("batch", "batch", "{}"),
    ("provider", "provider", "{}"),
    ("s/iteration", "seconds_per_iteration", "{:.4f}"),
    ("images/s", "images_per_second", "{:.2f}"),
    ("ms/image p20", "ms_p20", "{:.3f}"),
    ("p50", "ms_p50", "{:.3f}"),
    ("p80", "ms_p80", "{:.3f}"),
    ("p99", "ms_p99", "{:.3f}"),
    ("vs plain", "ratio_to_plain", "{:.2f}x"),
    ("of roofline", "roofline", "{:.2f}"),
    ("passes", "network_passes", "{}"),
    ("launches", "launches", "{:.0f}"),
    ("captured MB", "captured_mb", "{:.0f}"),
    ("import s", "import_s", "{:.2f}"),
    ("ready s", "ready_s", "{:.2f}"),
    ("first image s", "first_image_s", "{:.2f}"),
    ("warm-up s", "warm_up_s", "{:.2f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
    ("off plain", "relative_error", "{:.1e}"),
]
_COLOURS = {
    "plain": "#9aa0a6",
    "plain_no_tf32": "#c4c7cb",
    "compile": "#f2a541",
    "drop_in": "#8ab4f8",
    "sign_fast": "#2b7de9",
    "sign_fast_combined": "#0b4fb3",
}
_MARKERS = {"plain": "s", "compile": "^", "drop_in": "D", "sign_fast": "o"}


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, those that any row has; a provider that cannot run has its reason instead of figures."""
    several = len({row["steps"] for row in rows if "steps" in row}) > 1
    header = _HEADER[:1] + ([("steps", "steps", "{}")] if several else []) + _HEADER[1:]
    header = [column for column in header if any(row.get(column[1], "") != "" for row in rows)]
    lines = [[title for title, _, _ in header]]
    for row in rows:
        full = header[: 2 + several] if "skipped" in row else header
        cells = [form.format(row[key]) if row.get(key, "") != "" else "-" for _, key, form in full]
        lines.append([*cells, f"not run: {row['skipped']}"] if "skipped" in row else cells)
    widths = [max(len(line[i]) for line in lines if len(line) == len(header) or i < 2) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)) for line in lines)


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Bars of images/s by batch with p20 to p80, and the ratio to plain over each; ImportError without matplotlib."""
    pyplot = _pyplot()
    shown = [row for row in rows if "skipped" not in row]
    batches = sorted({row["batch"] for row in shown})
    names = list(dict.fromkeys(row["provider"] for row in shown))
    figure, panels = pyplot.subplots(1, len(batches), figsize=(1.6 + 2.6 * len(batches), 4.2), squeeze=False)
    for axis, batch in zip(panels[0], batches, strict=True):
        for i, name in enumerate(names):
            row = next((r for r in shown if r["batch"] == batch and r["provider"] == name), None)
            if row is None:
                continue
            rate = row["images_per_second"]
            spread = [[rate - 1000 / row["ms_p80"]], [1000 / row["ms_p20"] - rate]]
            axis.bar(i, rate, 0.75, color=_COLOURS[name], yerr=spread, capsize=4, ecolor="#444444")
            if "ratio_to_plain" in row and name != "plain":
                top = 1000 / row["ms_p20"]
                axis.annotate(
                    f"{row['ratio_to_plain']:.2f}×", (i, top), (0, 4), textcoords="offset points", ha="center"
                )
        axis.set_xticks(range(len(names)), names, rotation=20)
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("images / s (median, bars p20 to p80)")
    _save(figure, path, title)


def plot_sweep(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Images/s over batch size, a panel for each number of steps, a line for each provider, p20 to p80 shaded."""
    pyplot = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator

    shown = [row for row in rows if "skipped" not in row]
    batches = sorted({row["batch"] for row in shown})
    steps = sorted({row["steps"] for row in shown})
    figure, panels = pyplot.subplots(
        1, len(steps), figsize=(1.4 + 3.1 * len(steps), 4.0), sharex=True, sharey=True, squeeze=False
    )
    for axis, number in zip(panels[0], steps, strict=True):
        for name in dict.fromkeys(row["provider"] for row in shown):
            line = sorted((r for r in shown if (r["provider"], r["steps"]) == (name, number)), key=lambda r: r["batch"])
            x = [row["batch"] for row in line]
            style = {"color": _COLOURS[name], "zorder": 3 if name == "sign_fast" else 2}
            axis.plot(
                x, [r["images_per_second"] for r in line], marker=_MARKERS[name], ms=4, lw=1.6, label=name, **style
            )
            low, high = ([1000 / row[key] for row in line] for key in ("ms_p80", "ms_p20"))
            axis.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, map(str, batches), fontsize=8)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(True, color="#e6e6e6", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{number} step{'s' if number > 1 else ''}", fontsize=10)
        axis.set_xlabel("batch")
    panels[0][0].set_ylabel("images / s (median, p20 to p80 shaded)")
    panels[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path, title)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    _pyplot().close(figure)

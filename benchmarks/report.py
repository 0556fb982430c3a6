"""The table on the screen and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sign_fast.checkpoints.atomic import write_atomically

_HEADER = [
    ("batch", "batch", "{}"),
    ("provider", "provider", "{}"),
    ("images/s", "images_per_second", "{:.2f}"),
    ("ms/image p20", "ms_p20", "{:.3f}"),
    ("p50", "ms_p50", "{:.3f}"),
    ("p80", "ms_p80", "{:.3f}"),
    ("vs plain", "ratio_to_plain", "{:.2f}x"),
    ("first image s", "first_image_s", "{:.2f}"),
    ("warm-up s", "warm_up_s", "{:.2f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
]


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; a provider that cannot run has its reason instead of figures."""
    lines = [[title for title, _, _ in _HEADER]]
    for row in rows:
        if "skipped" in row:
            lines.append([str(row["batch"]), row["provider"], f"not here: {row['skipped']}"])
        else:
            cells = [form.format(row[key]) if row.get(key, "") != "" else "-" for _, key, form in _HEADER]
            lines.append(cells)
    full = [line for line in lines if len(line) == len(_HEADER)]
    widths = [max(len(line[i]) for line in full) for i in range(len(_HEADER))]
    widths[1] = max(len(line[1]) for line in lines)
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)) for line in lines)


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Bars of images/s by batch with p20 to p80, and the ratio to plain over each; ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "skipped" not in row]
    batches = sorted({row["batch"] for row in shown})
    names = list(dict.fromkeys(row["provider"] for row in shown))
    colours = {"plain": "#9aa0a6", "compile": "#f2a541", "sign_fast": "#2b7de9"}
    figure, panels = pyplot.subplots(1, len(batches), figsize=(1.6 + 2.6 * len(batches), 4.2), squeeze=False)
    for axis, batch in zip(panels[0], batches, strict=True):
        for i, name in enumerate(names):
            row = next((r for r in shown if r["batch"] == batch and r["provider"] == name), None)
            if row is None:
                continue
            rate = row["images_per_second"]
            spread = [[rate - 1000 / row["ms_p80"]], [1000 / row["ms_p20"] - rate]]
            axis.bar(i, rate, 0.75, color=colours.get(name), yerr=spread, capsize=4, ecolor="#444444")
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
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    pyplot.close(figure)

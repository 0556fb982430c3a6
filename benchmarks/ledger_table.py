"""Writes the tables of README and docs from the ledger, so that every figure there has a row; --check only compares.

A table stands between `<!-- ledger preset=digits-uncond device_type=cpu -->` and `<!-- /ledger -->`; the words filter
the rows (`sampler=edm steps=18 threads=1`; `mode=latency`, `mode=training` or `mode=diffusers`, else it is
mode=throughput), the newest run of each batch size, sampler, steps, dtype and threads is shown; what differs among the
rows has its column.
`<!-- kernels device_type=cpu -->` is the same of the ledger of single operations: the newest run, summed up over its
shapes.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

from benchmarks.ledger import COLUMNS, DEFAULT, read

PAGES = [DEFAULT.parents[2] / name for name in ("README.md", "docs/performance.md")]
_MARKED = re.compile(r"(<!-- (ledger|kernels) ([^>]*?) ?-->\n).*?(<!-- /\2 -->)", re.S)


_SETTING = ("sampler", "steps", "dtype", "threads")  # each combination is a measurement of its own
_NUMBERS = ("batch", "steps", "threads")
_SPREAD = ("ms_p50", "ms_p20", "ms_p80")
_Row = dict[str, str]


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[_Row], str]:
    return lambda r: form.format(float(r[key]) * scale) if r.get(key) else "–"


def _rate(r: _Row) -> str:
    if not r["images_per_second"]:
        return "–"
    rate = float(r["images_per_second"])
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def _spread(r: _Row) -> str:
    if not r["ms_p50"]:
        return "–"
    p50, p20, p80 = (f"{ms:.0f}" if (ms := float(r[key])) >= 1000 else f"{ms:.3g}" for key in _SPREAD)
    return f"{p50} ({p20}, {p80})"


# heading, cell, and the column that has to be filled in by a row for the heading to be shown
_COLUMNS: list[tuple[str, Callable[[_Row], str], str]] = [
    ("images/s", _rate, "images_per_second"),
    ("s/iteration", _number("seconds_per_iteration", "{:.3g}"), "seconds_per_iteration"),
    ("ms/image (p20, p80)", _spread, "ms_p50"),
    ("p99", _number("ms_p99", "{:.3g}"), "ms_p99"),
    ("vs plain", _number("ratio_to_plain", "{:.2f}×"), "ratio_to_plain"),
    ("of roofline", _number("roofline", "{:.0f}%", 100), "roofline"),
    ("network passes", _number("network_passes", "{:.0f}"), "network_passes"),
    ("launches", _number("launches", "{:.0f}"), "launches"),
    ("captured", _number("captured_mb", "{:.0f} MB"), "captured_mb"),
    ("import", _number("import_s", "{:.1f} s"), "import_s"),
    ("first image", _number("first_image_s", "{:.1f} s"), "first_image_s"),
    ("peak memory", _number("peak_mb", "{:.0f} MB"), "peak_mb"),
]


def _place(r: _Row) -> tuple[Any, ...]:
    return tuple(int(r[key]) if key in _NUMBERS else r[key] for key in (*_SETTING, "batch"))


def markdown(rows: list[_Row]) -> str:
    """The table of these rows, and a line that says where they come from."""
    # of each measurement the newest run, and that one whole
    runs = {_place(r): (r["date"], r["command"]) for r in rows}
    rows = [r for r in rows if runs[_place(r)] == (r["date"], r["command"])]
    newest = {(_place(r), r["provider"]): r for r in rows}
    order = sorted(newest, key=lambda key: (key[0], _ORDER.index(key[1])))
    varying = [key for key in _SETTING if len({r[key] for r in rows}) > 1]
    columns = [(title, cell) for title, cell, key in _COLUMNS if any(r[key] for r in rows)]
    lines = ["| " + " | ".join([*varying, "batch", "provider", *(title for title, _ in columns)]) + " |"]
    right = ["---" if key not in _NUMBERS else "---:" for key in varying]
    lines.append("|" + "|".join([*right, "---:", "---", *("---:" for _ in columns)]) + "|")
    for key in order:
        r = newest[key]
        cells = [*(r[name] for name in varying), r["batch"], f"`{r['provider']}`", *(cell(r) for _, cell in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    sources = {
        f"{r['device']}, {r['threads']} threads, driver {r['driver']}, torch {r['torch']}, {r['dtype']}, "
        f"{r['sampler'] or r['method']} {r['steps']} step(s), commit {r['commit']}, {r['date'][:10]}: `{r['command']}`"
        for r in newest.values()
    }
    return "\n".join([*lines, "", *(f"<sub>{source}</sub>" for source in sorted(sources))]) + "\n"


def kernels_markdown(rows: list[dict[str, str]]) -> str:
    """The newest run of these rows: for each operation its speed against eager PyTorch over all shapes."""
    last = max(rows, key=lambda r: r["date"])
    found: defaultdict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for r in rows:
        if (r["date"], r["command"], r["provider"]) == (last["date"], last["command"], "sign_fast"):
            key = (r["operation"], r["direction"], r["dtype"], r["batch"])
            found[key].append(float(r["ratio_to_eager"]))
    lines = ["| operation | direction | batch | shapes | times as fast as eager (geometric mean) | least | most |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for (operation, direction, dtype, batch), ratios in found.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"| `{operation}` {dtype} | {direction} | {batch} | {len(ratios)} "
            f"| {mean:.2f}× | {min(ratios):.2f}× | {max(ratios):.2f}× |"
        )
    source = (
        f"{last['device']}, {last['threads']} threads, driver {last['driver']}, torch {last['torch']}, "
        f"commit {last['commit']}, {last['date'][:10]}: `{last['command']}`"
    )
    return "\n".join([*lines, "", f"<sub>{source}</sub>"]) + "\n"


_ORDER = ["plain", "plain_no_tf32", "channels_last", "compile", "drop_in"]
_ORDER += ["sign_fast", "sign_fast_combined", "sign_fast_compile"]
_BUNDLED = re.compile(r"(<!-- bundled -->\n).*?(<!-- /bundled -->)", re.S)


def bundled() -> str:
    """The table of bundled networks, from the facts that training and evaluation wrote beside them."""
    from sign_fast.checkpoints.store import bundled_names, find, read_config

    lines = ["| name | steps | Fréchet distance | made by |", "|---|---|---:|---|"]
    for name in bundled_names():
        config = read_config(find(name))
        quality, command = config["quality"], config["trained"]["command"]
        steps = f"{quality['steps']} {quality['sampler']}"
        lines.append(f"| `{name}` | {steps} | {quality['Fréchet distance']} | `{command}` |")
    return "\n".join(lines) + "\n"


def rewritten(text: str, rows: list[dict[str, str]], kernel_rows: list[dict[str, str]] | None = None) -> str:
    """`text` with every marked table made anew, from the rows of the ledger and of the kernels' ledger.

    Raises:
        ValueError: a filter that no row passes or no column has, or a marker without its end.
    """

    # rows from before there was a column have it empty, from before there were modes are of throughput
    rows = [{**dict.fromkeys(COLUMNS, ""), **r, "mode": r.get("mode") or "throughput"} for r in rows]

    def table(match: re.Match[str]) -> str:
        start, book, words, end = match.groups()
        pages, show = (rows, markdown) if book == "ledger" else (kernel_rows or [], kernels_markdown)
        wanted = {"mode": "throughput"} if book == "ledger" else {}
        wanted |= dict(word.split("=", 1) for word in words.split())
        if unknown := [key for key in wanted if pages and key not in pages[0]]:
            raise ValueError(f"the ledger has no column {unknown[0]}")
        chosen = [r for r in pages if all(r[key] == value for key, value in wanted.items())]
        if not chosen:
            raise ValueError(f"no ledger row for {words}")
        return f"{start}{show(chosen)}{end}"

    for book in ("ledger", "kernels"):
        if text.count(f"<!-- {book} ") != sum(match[1] == book for match in _MARKED.findall(text)):
            raise ValueError(f"a <!-- {book} … --> has no <!-- /{book} -->")
    return _BUNDLED.sub(lambda match: f"{match[1]}{bundled()}{match[2]}", _MARKED.sub(table, text))


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if the file is not current.")
@click.argument("paths", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1)
def main(check: bool, paths: tuple[Path, ...]) -> None:
    """Make the tables of PATHS (README.md and docs/performance.md) from the ledgers in benchmarks/results."""
    from benchmarks.kernels import LEDGER as KERNELS
    from sign_fast.checkpoints.atomic import write_text

    for path in paths or PAGES:
        text = path.read_text(encoding="utf-8")
        try:
            new = rewritten(text, read(DEFAULT), read(KERNELS))
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{path}: {error}") from error
        if check and new != text:
            raise click.ClickException(f"{path} is not what the ledger says: run python benchmarks/ledger_table.py")
        if not check and new != text:
            write_text(path, new)


if __name__ == "__main__":
    main()

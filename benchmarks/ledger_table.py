"""Writes README's tables from the ledger, so that every figure there has a row; --check only compares.

A table stands between `<!-- ledger preset=digits-uncond device_type=cpu -->` and `<!-- /ledger -->`; the words filter
the rows, the newest run of each batch size is shown. `<!-- kernels device_type=cpu -->` is the same of the ledger of
single operations: the newest run, summed up over its shapes.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from pathlib import Path

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

_MARKED = re.compile(r"(<!-- (ledger|kernels) ([^>]*?) ?-->\n).*?(<!-- /\2 -->)", re.S)


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of these rows, and a line that says where they come from."""
    # of each batch size the newest run, and that one whole
    runs = {r["batch"]: (r["date"], r["command"]) for r in rows}
    rows = [r for r in rows if runs[r["batch"]] == (r["date"], r["command"])]
    newest = {(int(r["batch"]), r["provider"]): r for r in rows}
    lines = ["| batch | provider | images/s | ms/image (p20, p80) | vs plain | first image | peak memory |"]
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for (batch, provider), r in sorted(newest.items(), key=lambda item: (item[0][0], _ORDER.index(item[0][1]))):
        first = f"{float(r['first_image_s']):.1f} s" if r["first_image_s"] else "–"
        peak = f"{float(r['peak_mb']):.0f} MB" if r["peak_mb"] else "–"
        spread = f"{float(r['ms_p50']):.3g} ({float(r['ms_p20']):.3g}, {float(r['ms_p80']):.3g})"
        ratio = f"{float(r['ratio_to_plain']):.2f}×" if r["ratio_to_plain"] else "–"
        rate = float(r["images_per_second"])
        shown = f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"
        lines.append(f"| {batch} | `{provider}` | {shown} | {spread} | {ratio} | {first} | {peak} |")
    sources = {
        f"{r['device']}, {r['threads']} threads, driver {r['driver']}, torch {r['torch']}, {r['dtype']}, "
        f"{r['sampler']} {r['steps']} step(s), commit {r['commit']}, {r['date'][:10]}: `{r['command']}`"
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


_ORDER = ["plain", "compile", "sign_fast"]
_BUNDLED = re.compile(r"(<!-- bundled -->\n).*?(<!-- /bundled -->)", re.S)


def bundled() -> str:
    """The table of bundled networks, from the facts that training and evaluation wrote beside them."""
    from sign_fast.checkpoints.store import bundled_names, find, read_config

    lines = ["| name | Fréchet distance | made by |", "|---|---:|---|"]
    for name in bundled_names():
        config = read_config(find(name))
        lines.append(f"| `{name}` | {config['quality']['Fréchet distance']} | `{config['trained']['command']}` |")
    return "\n".join(lines) + "\n"


def rewritten(text: str, rows: list[dict[str, str]], kernel_rows: list[dict[str, str]] | None = None) -> str:
    """`text` with every marked table made anew, from the rows of the ledger and of the kernels' ledger.

    Raises:
        ValueError: a filter that no row passes or no column has, or a marker without its end.
    """

    def table(match: re.Match[str]) -> str:
        start, book, words, end = match.groups()
        pages, show = (rows, markdown) if book == "ledger" else (kernel_rows or [], kernels_markdown)
        wanted = dict(word.split("=", 1) for word in words.split())
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
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False), default="README.md")
def main(check: bool, path: Path) -> None:
    """Make the tables of PATH (README.md) from benchmarks/results/ledger.csv and kernels.csv."""
    from benchmarks.kernels import LEDGER as KERNELS
    from benchmarks.ledger import DEFAULT, read
    from sign_fast.checkpoints.atomic import write_text

    text = path.read_text(encoding="utf-8")
    try:
        new = rewritten(text, read(DEFAULT), read(KERNELS))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if check and new != text:
        raise click.ClickException(f"{path} is not what the ledger says: run python benchmarks/ledger_table.py")
    if not check:
        write_text(path, new)


if __name__ == "__main__":
    main()

"""How fast are the operations alone, against ordinary PyTorch? Run with --help for the arguments.

On a GPU: from a cold L2 cache, captured in CUDA graphs, beside the copy bandwidth and the matrix rate of the same run,
against eager PyTorch, torch.compile and each backend of scaled_dot_product_attention. On a CPU: in turns with eager
PyTorch. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(ROOT))

import click
import torch

from benchmarks import ledger as book
from benchmarks.codegen import list_option
from benchmarks.kernel_cases import OPERATIONS, Case, Direction, Inputs, cases, cpu_cases
from benchmarks.kernel_timing import Function, Gpu, difference, in_turns, on_stream, prepare
from benchmarks.measure import quantile
from sign_fast.errors import SignFastError, first_line
from sign_fast.kernels.dispatch import taken

LEDGER = ROOT / "benchmarks" / "results" / "kernels.csv"
FACTS = book.COLUMNS[: book.COLUMNS.index("preset")]  # date, commit, device, versions
FIGURES = [
    "operation", "direction", "shape", "batch", "dtype", "provider", "us_p20", "us_p50", "us_p80", "gb_s", "tflop_s",
    "copy_gb_s", "matrix_tflop_s", "ratio_to_eager", "rounds",
]  # fmt: skip
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-2}  # against gross errors: the tests hold the bounds


def _providers(case: Case, compiled: bool) -> dict[str, Any]:
    named: dict[str, Any] = {"sign_fast": case.ours, "eager": case.eager, **case.rivals()}
    if compiled:
        named["compile"] = torch.compile(case.eager, dynamic=False)
    return named


def _named(case: Case, direction: Direction) -> dict[str, Any]:
    return {
        "operation": case.operation,
        "direction": direction,
        "shape": case.shape,
        "batch": case.batch,
        "dtype": case.dtype,
    }


def _row(case: Case, direction: Direction, provider: str, times: list[float]) -> dict[str, Any]:
    p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
    row = {
        **_named(case, direction),
        "provider": provider,
        "us_p20": round(p20 * 1e6, 2),
        "us_p50": round(p50 * 1e6, 2),
        "us_p80": round(p80 * 1e6, 2),
        "gb_s": round(case.bytes(direction) / p50 / 1e9, 1),
        "rounds": len(times),
    }
    if flops := case.flops(direction):
        row["tflop_s"] = round(flops / p50 / 1e12, 2)
    return row


def _fast_calls() -> int:
    return sum(count for (_, implementation), count in taken.items() if implementation != "reference")


def _check(case: Case, inputs: Inputs, direction: Direction, device: str) -> None:
    what, before = f"{case.operation} {case.shape} {case.dtype} {direction}", _fast_calls()
    error = difference(case, inputs, direction)
    if not error <= TOLERANCE[case.dtype]:
        raise SignFastError(f"nothing is reported, {what} is wrong: its error is {error:.2e} of the result")
    if _fast_calls() == before:
        raise SignFastError(f"nothing is reported, {what} does not take its fast path on {device}")


def measure(
    case: Case, direction: Direction, gpu: Gpu | None, seconds: float, compiled: bool = False, only: str = ""
) -> list[dict[str, Any]]:
    """A row for each provider, one that cannot run has "skipped"; the first call checks the outputs."""
    device = "cpu" if gpu is None else "cuda"
    rows: list[dict[str, Any]] = []
    functions: dict[str, Function] = {}
    with on_stream(gpu):
        inputs = case.inputs(device)
        if not only:
            _check(case, inputs, direction, device)
        for name, forward in _providers(case, compiled).items():
            if only and name != only:
                continue
            try:
                function = prepare(inputs, forward, direction)
                function()  # what cannot run says so here
                functions[name] = function if gpu is None else gpu.capture(function)
            except Exception as error:  # an SDPA backend without that shape, a compiler that gives up
                if name == "sign_fast":
                    raise
                why = f"{type(error).__name__}: {first_line(error)}"[:160]
                rows.append({**_named(case, direction), "provider": name, "skipped": why})
        if gpu is None:
            times = in_turns(functions, seconds)
        else:
            times = {name: gpu.time(function, seconds) for name, function in functions.items()}
    return [_row(case, direction, name, found) for name, found in times.items()] + rows


def on_gpu(operations: Iterable[str], budget: float, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The ceilings of this run, and the rows; torch.compile comes last, for as many shapes as the time allows."""
    import torch._functorch.config as compiler

    compiler.donated_buffer = False  # a compiled backward is run many times
    started = time.monotonic()
    gpu = Gpu()
    ceilings = {
        "copy_gb_s": round(gpu.copy_rate() / 1e9, 1),
        "matrix_tflop_s": round(gpu.matrix_rate(torch.bfloat16) / 1e12, 1),
    }
    wanted = [case for name in operations for case in cases(name, (64,) if quick else (64, 1), ("bfloat16",))]
    if quick:
        seen: dict[str, Case] = {}
        for case in wanted:
            seen.setdefault(case.operation, case)
        wanted = list(seen.values())
    wanted.sort(key=lambda case: (-case.batch, -case.bytes("forward") - case.flops("forward") / 200))
    rows: list[dict[str, Any]] = []
    for compiled in (False, True):
        for case in wanted:
            if compiled and case.batch == 1:
                continue
            for direction in case.directions:
                left = budget - (time.monotonic() - started)
                if left <= 0 or (not compiled and left < 0.35 * budget and case.batch == 1):
                    rows.append({**_named(case, direction), "provider": "all", "skipped": "no time was left"})
                    continue
                found = measure(case, direction, gpu, 0.05, compiled, "compile" if compiled else "")
                rows += [{**row, **ceilings} for row in found]
                torch._dynamo.reset()
    return ceilings, rows


def on_cpu(operations: Iterable[str], budget: float, quick: bool, compiled: bool) -> list[dict[str, Any]]:
    """Rows of the operations' C++ versions and eager PyTorch, in turns."""
    wanted = [case for name in operations for case in cpu_cases(name)]
    wanted = wanted[:2] if quick else wanted
    number = sum(len(case.directions) for case in wanted)
    rows: list[dict[str, Any]] = []
    for case in wanted:
        for direction in case.directions:
            rows += measure(case, direction, None, budget / max(number, 1), compiled)
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with how many times as fast as eager it is."""
    eager = {_key(row): row["us_p50"] for row in rows if row["provider"] == "eager" and "us_p50" in row}
    for row in rows:
        if "us_p50" in row and _key(row) in eager:
            row["ratio_to_eager"] = round(eager[_key(row)] / row["us_p50"], 3)
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("operation", "direction", "shape", "batch", "dtype"))


def means(rows: list[dict[str, Any]]) -> list[str]:
    """A line an operation, direction, dtype and batch: the geometric mean of its speed against eager's."""
    ratios: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["provider"] == "sign_fast" and "ratio_to_eager" in row:
            ratios[row["operation"], row["direction"], row["dtype"], row["batch"]].append(row["ratio_to_eager"])
    lines = []
    for (operation, direction, dtype, batch), found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        lines.append(
            f"{operation} {direction}, {dtype}, batch {batch}: {mean:.2f} times as fast as eager "
            f"(geometric mean of {len(found)} shapes, the least {min(found):.2f})"
        )
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    columns = [name for name in FIGURES if any(name in row for row in rows)]
    lines = [columns]
    for row in rows:
        lines.append([str(row.get(name, "")) for name in columns] + ([row["skipped"]] if "skipped" in row else []))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, [*widths, 0], strict=False)).rstrip() for line in lines
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@list_option("--operations", OPERATIONS)
@click.option("--seconds", type=click.FloatRange(min=0), help="Time for all.  [default: 240, with --quick 20]")
@click.option("--compile", "compiled", is_flag=True, help="On a CPU: torch.compile as well.")
@click.option("--quick", is_flag=True, help="One or two shapes of each operation.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file of the results.")
@click.option(
    "--ledger",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measure nothing: append the results in this JSON file to --ledger-file.",
)
@click.option("--ledger-file", type=click.Path(path_type=Path, dir_okay=False), default=LEDGER, show_default="results/")
def kernels(
    device: str | None,
    operations: tuple[str, ...],
    seconds: float | None,
    compiled: bool,
    quick: bool,
    out: Path | None,
    ledger: Path | None,
    ledger_file: Path,
) -> None:
    """Time the operations at the published networks' shapes."""
    if ledger is not None:
        report = json.loads(ledger.read_text())
        measured = [{**report["environment"], **row} for row in report["rows"] if "skipped" not in row]
        book.append(ledger_file, measured, FACTS + FIGURES)
        click.echo(f"{len(measured)} rows appended to {ledger_file}")
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = seconds if seconds is not None else 20.0 if quick else 240.0
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SignFastError("there is no NVIDIA GPU here that PyTorch can use: leave --device out")
        ceilings, rows = on_gpu(operations, budget, quick)
    else:
        ceilings, rows = {}, on_cpu(operations, budget, quick, compiled)
    report = {"environment": book.environment(device), **ceilings, "rows": with_ratios(rows)}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(table(rows))
    for line in [*(f"{name}: {value}" for name, value in ceilings.items()), *means(rows)]:
        click.echo(line)


def main() -> None:
    """Run; foreseen errors are one line and a non-zero exit status."""
    try:
        kernels.main(prog_name="kernels.py", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"kernels: error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except SignFastError as error:
        click.echo(f"kernels: error: {first_line(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

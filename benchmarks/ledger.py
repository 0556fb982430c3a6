"""The append-only ledger: one CSV row a measurement, with all that is needed to repeat it.

`python benchmarks/ledger.py FILE …` appends what throughput.py and training.py wrote elsewhere: sweep.json, ….
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click
import torch

import sign_fast
from sign_fast.checkpoints.atomic import explain_os_errors, make_folder, write_atomically
from sign_fast.errors import SignFastError
from sign_fast.kernels import extension

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "benchmarks" / "results" / "ledger.csv"
COLUMNS = [
    "date",
    "commit",
    "command",
    "device",
    "device_type",
    "driver",
    "torch",
    "triton",
    "cuda",
    "python",
    "sign_fast",
    "extension",
    "threads",
    "preset",
    "weights",
    "batch",
    "steps",
    "sampler",
    "dtype",
    "provider",
    "images_per_second",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "ratio_to_plain",
    "first_image_s",
    "warm_up_s",
    "peak_mb",
    "rounds",
    "mode",  # throughput, latency, cold, sweep, training or diffusers; empty in rows from before there was a choice
    "ms_p99",
    "import_s",
    "ready_s",
    "launches",
    "captured_mb",
    "gflop_per_call",
    "mb_per_call",
    "matrix_tflop_s",
    "copy_gb_s",
    "roofline",
    "method",  # of distillation, with mode training
    "seconds_per_iteration",
    "network_passes",
    "relative_error",  # of a diffusers network's output, of plain's root mean square
]


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """The commit of the tree, with -dirty where files differ from it; the ledger itself does not count."""
    revision = _run("git", "rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("-dirty" if _run("git", "status", "--porcelain", "--", ".", ":!benchmarks/results") else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def without_folder(word: str) -> str:
    """A word of a command in which a file is named from the repository, and one outside of it by its last part."""
    option, equals, path = word.rpartition("=")
    path = path.removeprefix(f"{ROOT}{os.sep}")
    return f"{option}{equals}{Path(path).name if os.path.isabs(path) else path}"


def environment(device: str) -> dict[str, Any]:
    """The facts that all rows of one run share."""
    cuda = device.startswith("cuda")
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    words = [Path(sys.argv[0]).name, *(without_folder(word) for word in sys.argv[1:])]
    if cuda:
        name = torch.cuda.get_device_name(device)
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0:1]
    else:
        name, driver = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}", []
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{words[0]}", *words[1:]]),
        "device": name,
        "device_type": "cuda" if cuda else "cpu",
        "driver": driver[0] if driver else "none",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "sign_fast": sign_fast.__version__,
        "extension": "loaded" if extension.missing() is None else "missing",
        "threads": torch.get_num_threads(),
    }


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """The file, opened for appending; nobody else has it meanwhile."""
    while True:
        with path.open("a+", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else it was replaced while this waited
                yield file
                return


def append(path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Add whole rows under a lock; a new file gets the header first, one without the last columns gets them, empty.

    Raises:
        SignFastError: the file has other columns, or cannot be written.
    """
    make_folder(path.parent)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    with explain_os_errors(path), _locked(path) as file:
        file.seek(0)
        header = file.readline().rstrip("\r\n").split(",")
        if header != list(columns)[: len(header)] and header != [""]:
            raise SignFastError(f"{path} has other columns than this program writes: name another file with --ledger")
        if len(header) < len(columns):
            file.seek(0)
            writer.writeheader()
            writer.writerows(csv.DictReader(file))
            writer.writerows(rows)
            write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
            return
        writer.writerows(rows)
        size = os.fstat(file.fileno()).st_size
        try:
            file.write(text.getvalue())
            file.flush()
        except OSError:
            os.ftruncate(file.fileno(), size)  # whole rows or none
            raise


def read(path: Path) -> list[dict[str, str]]:
    """All rows, oldest first."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@click.command()
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT, show_default="results/")
@click.argument("reports", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True)
def main(ledger: Path, reports: tuple[Path, ...]) -> None:
    """Append the rows of throughput's and training's JSON REPORTS to the ledger."""
    try:
        found = [row for path in reports for row in json.loads(path.read_text())["rows"] if "skipped" not in row]
        if not all("provider" in row and "date" in row for row in found):
            raise ValueError("a row without its provider and date")
        append(ledger, found)
    except (KeyError, TypeError, ValueError) as error:
        raise click.ClickException(f"not a report of benchmarks/throughput.py or training.py: {error}") from error
    except SignFastError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{len(found)} rows appended to {ledger}")


if __name__ == "__main__":
    main()

"""How much host time does one kernel launch take? Run with --help for the arguments.

On a GPU: the launcher of precompiled kernels (sign_fast._launcher) beside Triton's own, in turns, on launches so small
that the GPU keeps up. Without one: the launcher against the tests' stand-in driver, which launches nothing, so that the
figure is that of reading the arguments and finding the kernel alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(ROOT))

import click
import torch

from benchmarks import ledger as book
from benchmarks.measure import quantile, take_turns
from sign_fast.errors import SignFastError, first_line
from sign_fast.kernels import ahead_of_time
from sign_fast.kernels.attention.launches import launches_forward as attention
from sign_fast.kernels.device import KNOWN, Device, device_of
from sign_fast.kernels.group_norm_silu.launches import launches_forward as group_norm_silu
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs import elf, key
from sign_fast.kernels.sampler_step.launches import launches_noise

LAUNCHES = 200  # a round: fewer than a stream takes before a launch has to wait
ROUNDS = 20
FIGURES = ["kernel", "parameters", "tensors", "provider", "us_p20", "us_p50", "us_p80", "rounds"]
PACKING = "packing only: a stand-in driver, which launches nothing"


def launches(device: str, figures: Device) -> list[Launch]:
    """Small launches of kernels with many and with few parameters."""
    x = torch.zeros(2, 128, 8, 8, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last)
    weight, rows = torch.ones(128, device=device), torch.zeros(2, 128, device=device)
    stats = torch.empty(2, 32, 3, device=device)
    adaptive = {"emb": rows, "scale": rows, "shift": rows}
    norm = group_norm_silu(x, None, torch.empty_like(x), stats, 32, weight, weight, 1e-5, figures, **adaptive)
    heads = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16, device=device)
    seeds, image = torch.zeros(2, dtype=torch.int64, device=device), torch.empty(2, 3, 16, 16, device=device)
    return [
        *norm,
        *attention(heads, heads, heads, torch.empty_like(heads), None, figures),
        *launches_noise(seeds, 0, image, 1.0, figures),
    ]


def ours(launcher: Any, launch: Launch, index: int, stream: int, architecture: int) -> Callable[[], object]:
    """One launch by the launcher, which has loaded its machine code."""
    name = key.kernel_name(launch)
    done = ahead_of_time.compile(launch, architecture)
    sizes = elf.parameter_sizes(done.cubin, done.name)
    launcher.declare(name, key.parameters(launch.function))
    launcher.add(index, key.key(launch), done.cubin, done.name, done.num_warps, done.shared_bytes, sizes)
    values = (name, launch.grid, launch.arguments, launch.constants)
    options = (launch.num_warps, launch.num_stages, launch.enable_fp_fusion)

    def call() -> None:
        if launcher.launch(index, stream, *values, *options) is not None:
            raise SignFastError(f"nothing is reported, the launcher does not find {name}")

    return call


def tritons(launch: Launch) -> Callable[[], object]:
    """One launch by Triton, its arguments at hand as the launcher's are."""
    kernel = launch.function[launch.grid]
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.enable_fp_fusion,
    }
    given = {**launch.arguments, **launch.constants, **options}
    return lambda: kernel(**given)


def measure(
    launch: Launch, calls: dict[str, Callable[[], object]], seconds: float, wait: Callable[[], object]
) -> list[dict[str, Any]]:
    """A row for each provider: microseconds of host time a launch."""

    def timed(call: Callable[[], object]) -> Callable[[int], float]:
        def several(_: int) -> float:
            wait()
            before = time.perf_counter()
            for _ in range(LAUNCHES):
                call()
            return (time.perf_counter() - before) / LAUNCHES

        return several

    for call in calls.values():  # what is compiled or loaded at first
        call()
    times = take_turns({name: timed(call) for name, call in calls.items()}, seconds, ROUNDS)
    wait()
    facts = {
        "kernel": key.kernel_name(launch),
        "parameters": len(launch.function.params),
        "tensors": sum(isinstance(value, torch.Tensor) for value in launch.arguments.values()),
    }
    rows = []
    for name, found in times.items():
        points = {f"us_p{q}": round(quantile(found, q / 100) * 1e6, 3) for q in (20, 50, 80)}
        rows.append({**facts, "provider": name, **points, "rounds": len(found)})
    return rows


def on_gpu(launcher: Any, seconds: float) -> list[dict[str, Any]]:
    """The launcher and Triton, in turns, on the current stream."""
    index, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    figures = device_of(torch.empty(0, device="cuda"))
    rows = []
    chosen = launches("cuda", figures)
    for launch in chosen:
        calls = {"sign_fast": ours(launcher, launch, index, stream, figures.architecture), "triton": tritons(launch)}
        rows += measure(launch, calls, seconds / len(chosen), torch.cuda.synchronize)
    return rows


def on_cpu(make: Callable[[str], Any], seconds: float) -> list[dict[str, Any]]:
    """The launcher on a stand-in driver."""
    from tests.packs import stand_in

    with tempfile.TemporaryDirectory() as folder:
        driver = stand_in.StandIn(stand_in.build(Path(folder)))
        driver.set(context=0)  # as torch leaves it
        driver.set(recording=0)
        launcher = make(driver.path)
        rows = []
        chosen = launches("cpu", KNOWN[90])
        for launch in chosen:
            rows += measure(launch, {"sign_fast": ours(launcher, launch, 0, 0, 90)}, seconds / len(chosen), int)
    return [{**row, "what": PACKING} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [FIGURES, *([str(row[name]) for name in FIGURES] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(FIGURES))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Time for all.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file of the results.")
def launch_overhead(device: str | None, seconds: float, out: Path | None) -> None:
    """Microseconds of host time a kernel launch."""
    try:
        from sign_fast._launcher import Launcher
    except ImportError as error:
        raise SignFastError(f"the launcher cannot be loaded ({error}): build it with make demo") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SignFastError("there is no NVIDIA GPU here that PyTorch can use: leave --device out")
        rows = on_gpu(Launcher(), seconds)
    else:
        rows = on_cpu(Launcher, seconds)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": book.environment(device), "rows": rows}, indent=1) + "\n")
    click.echo(table(rows))
    if device == "cpu":
        click.echo(PACKING)


def main() -> None:
    """Run; foreseen errors are one line and a non-zero exit status."""
    try:
        launch_overhead.main(prog_name="launch_overhead.py", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"launch_overhead: error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except SignFastError as error:
        click.echo(f"launch_overhead: error: {first_line(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

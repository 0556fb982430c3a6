"""What does a pack of machine code save? Run with --help for the arguments.

From the start of a process to its first image, with empty compiler caches, in turns: from packs (SIGN_FAST_NO_JIT=1, so
that a missing kernel would be an error), with Triton compiling at the first call, and torch.compile. The images of the
first two must be the same bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(ROOT))

import click

from benchmarks import cold
from benchmarks import ledger as book

# name: provider, environment besides SIGN_FAST_PACKS
WAYS = {
    "pack": ("sign_fast", {"SIGN_FAST_NO_JIT": "1"}),
    "jit": ("sign_fast", {"SIGN_FAST_PACKS": "none"}),  # those of an installed wheel neither
    "compile": ("compile", {"SIGN_FAST_PACKS": "none"}),
}
PROMISE = 5.0  # seconds to the first image from packs
FIGURES = ["provider", "first_image_s", "import_s", "ready_s", "rounds"]


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Run in a fresh process: seconds from `started` to the first image, and a hash of the image."""
    import torch

    from benchmarks.providers import Case, build_network, make

    imported = time.time() - request["started"]
    case = Case(**request["case"])
    images = make(request["provider"], case, build_network(case), own=True)([0])
    done = time.time() - request["started"]
    facts = {"import_s": imported, "ready_s": done - imported, "first_image_s": done}
    digest = hashlib.sha256(torch.as_tensor(images).cpu().numpy().tobytes()).hexdigest()
    served = 0
    if case.device.startswith("cuda"):
        from sign_fast.kernels.packs import dispatch

        packs = dispatch.of_device(torch.cuda.current_device())
        served = 0 if packs is None else packs.hits.total()
    return {**facts, "image": digest, "served": served}


def child_main() -> None:
    """The child's whole program: the request is its argument, the facts are its last line."""
    print(json.dumps(child(json.loads(sys.argv[1]))))


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start(way: str, packs: Path, case: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The facts of one way in a fresh process with empty compiler caches.

    Raises:
        RuntimeError: it failed or ran into the time limit.
    """
    provider, changes = WAYS[way]
    with cold.compiler_caches(), _environment({"SIGN_FAST_PACKS": str(packs.resolve()), **changes}):
        request = {"provider": provider, "case": case, "started": time.time()}
        return cold.in_fresh_process("import benchmarks.packs as p; p.child_main()", request, timeout)


def wrong(found: dict[str, list[dict[str, Any]]]) -> str:
    """What the facts of all runs say against them, or nothing."""
    ours = [facts for way in ("pack", "jit") for facts in found.get(way, [])]
    if len({facts["image"] for facts in ours}) > 1:
        return "packs and Triton's just-in-time compiler do not give the same image"
    if any(facts["served"] == 0 for facts in found.get("pack", [])):
        return "nothing was launched from the packs"
    if any(facts["served"] for facts in found.get("jit", [])):
        return "the run without packs launched from packs"
    return ""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--packs", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder.")
@click.option(
    "--preset", default="cifar10-uncond-vp", show_default=True, help="Network; weights are drawn from a seed."
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Of the inner network.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each way.")
@click.option("--timeout", type=float, default=120, show_default=True, help="Seconds of a process.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON with every run.")
def packs_command(packs: Path, preset: str, dtype: str, repeats: int, timeout: float, out: Path | None) -> None:
    """From process start to the first image: packs, Triton just in time, torch.compile."""
    import torch

    if not torch.cuda.is_available():
        click.echo("benchmarks/packs.py: there is no NVIDIA GPU here that PyTorch can use", err=True)
        sys.exit(1)
    case = {"preset": preset, "sampler": "few_step", "steps": 1, "dtype": dtype, "device": "cuda", "seed": 0}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    failed: dict[str, str] = {}
    for turn in range(repeats):
        for way in [*list(WAYS)[turn % len(WAYS) :], *list(WAYS)[: turn % len(WAYS)]]:
            if way not in failed:
                try:
                    found[way].append(start(way, packs, case, timeout))
                except RuntimeError as error:
                    failed[way] = str(error)
    if problem := wrong(found):
        click.echo(f"nothing is reported: {problem}", err=True)
        sys.exit(1)
    rows = []
    for way, runs in found.items():
        if way in failed or not runs:
            click.echo(f"{way:<8} failed: {failed.get(way)}")
            continue
        figures = {name: statistics.median(run[name] for run in runs) for name in FIGURES[1:-1]}
        rows.append({"provider": way, **figures, "rounds": len(runs)})
        click.echo(f"{way:<8} " + "  ".join(f"{name} {value:6.2f}" for name, value in figures.items()))
    for row in rows:
        if row["provider"] == "pack":
            kept = "kept" if row["first_image_s"] <= PROMISE else "NOT kept"
            click.echo(f"first image from packs within {PROMISE:.0f} s: {kept}")
    if out is not None:
        facts = {**book.environment("cuda"), "case": case, "rows": rows, "runs": found, "failed": failed}
        out.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(1 if "pack" in failed or "jit" in failed else 0)


if __name__ == "__main__":
    packs_command()

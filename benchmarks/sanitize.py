"""Runs every operation once on small shapes, forward and backward: `compute-sanitizer python benchmarks/sanitize.py`.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own, so that an access past its end is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click
import torch

from benchmarks.kernel_cases import OPERATIONS, small_cases
from benchmarks.kernel_timing import prepare


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cuda", show_default=True)
@click.option("--first", is_flag=True, help="One shape of each operation only.")
def sanitize(device: str, first: bool) -> None:
    """Every operation at small shapes, for a memory checker to watch."""
    for operation in OPERATIONS:
        for case in small_cases(operation)[: 1 if first else None]:
            inputs = case.inputs(device)
            for direction in case.directions:
                prepare(inputs, case.ours, direction)()
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                click.echo(f"{operation} {case.shape} {case.dtype} {direction}")


if __name__ == "__main__":
    sanitize()

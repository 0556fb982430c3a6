"""`sign-fast info`: what is installed, what is here, what is fast and what is not, with the reason."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def info(as_json: bool) -> None:
    """Versions, the C++ extension, devices, and which operations run fast here or why not."""
    facts = gather()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for section, entries in facts.items():
        click.echo(section)
        for name, value in entries.items():
            click.echo(f"  {name:<26} {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _graphs() -> dict[str, str]:
    from ..sampling import graphs

    off = os.environ.get(graphs.SWITCH) == "1"
    here = [
        f"{entry['graphs']} on {entry['device']}, {entry['captured_bytes'] / 2**20:.1f} MiB"
        for entry in graphs.captured()
        if entry["graphs"]
    ]
    return {
        "generations": f"run without, {graphs.SWITCH}=1"
        if off
        else f"captured on CUDA; {graphs.SWITCH}=1 turns it off",
        "captured in this process": "; ".join(here) or "none",
    }


def gather() -> dict[str, dict[str, Any]]:
    """All that `info` tells, as tables."""
    import torch

    from .. import __version__
    from ..checkpoints.store import bundled_names
    from ..kernels import extension, overview
    from ..models import preset_names

    versions = {"sign_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("triton", "numpy", "safetensors", "pillow")}
    versions["cuda of torch"] = torch.version.cuda or "none (CPU build)"
    missing = extension.missing()
    devices: dict[str, Any] = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs"
        )
    if not torch.cuda.is_available():
        devices["cuda"] = "none here" if torch.version.cuda else "none: this torch is a CPU build"
    switches = {name: value for name, value in os.environ.items() if name.startswith("SIGN_FAST_")}
    return {
        "versions": versions,
        "C++ extension": {"loaded": "yes"} if missing is None else {"loaded": "no", "why": str(missing)},
        "devices": devices,
        "operations": overview.operations(),
        "CUDA graphs": _graphs(),
        "networks": {"bundled": ", ".join(bundled_names()) or "none", "presets": ", ".join(preset_names())},
        "switches": switches or {"SIGN_FAST_*": "none set"},
    }

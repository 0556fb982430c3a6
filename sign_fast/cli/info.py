"""`sign-fast info`: what is installed, what is here, what is fast and what is not, with the reason."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option(
    "--network", help="Also tell of a network: a folder, a bundled name or a preset (weights are drawn then)."
)
@click.option("--device", help="Of that network: cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Of that network.",
)  # fmt: skip
def info(as_json: bool, network: str | None, device: str | None, dtype: str) -> None:
    """Versions, the C++ extension, devices, and which operations run fast here or why not.

    Of a network: launches of a forward on a GPU, plain and optimized, and the memory that generating takes.
    """
    facts = gather() if network is None else {f"network {network}": network_facts(network, device, dtype)} | gather()
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
        f"{entry['graphs']} on {entry['device']}, {_mib(entry['captured_bytes'])}"
        for entry in graphs.captured()
        if entry["graphs"]
    ]
    return {
        "generations": f"run without, {graphs.SWITCH}=1"
        if off
        else f"captured on CUDA; {graphs.SWITCH}=1 turns it off",
        "captured in this process": "; ".join(here) or "none",
    }


def machine_code() -> dict[str, str]:
    """The packs of machine code, what they have served in this process, and what the GPUs here lack."""
    import torch

    from ..kernels.device import figures
    from ..kernels.packs import dispatch
    from ..kernels.packs.store import DamagedPackError

    module = dispatch.launcher_module()
    facts = {"launcher": module if isinstance(module, str) else "sign_fast._launcher"}
    packs = dispatch.installed()
    for pack in packs:
        try:
            facts[dispatch.title(pack)] = (
                f"{len(pack.keys)} variants, {pack.path.stat().st_size / 2**20:.1f} MiB, Triton {pack.triton}, "
                f"ptxas {pack.ptxas}, of {', '.join(pack.networks)}"
            )
        except DamagedPackError as error:
            facts[dispatch.title(pack)] = f"not used: {error}; build it anew or remove it"
    if not packs:
        facts["packs"] = "none: " + (
            "Triton compiles at each kernel's first call"
            if find_spec("triton") is not None
            else "nor is Triton here, so a GPU would run plain PyTorch"
        )
    for index in range(torch.cuda.device_count()):
        served = dispatch.of_device(index)
        device = figures(index)
        number = device.architecture
        if served is None or not served.packs:
            facts[f"cuda:{index}"] = f"no pack for sm_{number}: {dispatch.build_line(number)}"
            continue
        used = ", ".join(map(dispatch.title, served.packs))
        facts[f"cuda:{index}"] = f"{used}; {served.hits.total()} launches from them, {served.misses.total()} not"
        missing = served.lacking(device)
        batches = " and ".join(map(str, dispatch.CHECKED_BATCHES))
        facts[f"cuda:{index} lacks"] = f"{len(missing)} variants of the packs' networks at batches {batches}" + (
            f", such as {missing[0]}; {dispatch.build_line(number)}" if missing else ""
        )
        for i, (miss, count) in enumerate(served.misses.items(), 1):
            facts[f"cuda:{index} lacked, {i}"] = f"{miss.key} ({count} launches): {miss.why}"
    return facts


def network_facts(name: str, device: str | None, dtype_name: str) -> dict[str, Any]:
    """What `info` tells of a network; on CUDA it generates an image, which captures a graph.

    Raises:
        SignFastError: it cannot be loaded.
    """
    import torch

    from .. import models
    from ..checkpoints.store import bundled_names, find, read_config, resolve_device
    from ..inference.launches import launches
    from ..sampling import ImageGenerator

    dtype = getattr(torch, dtype_name)
    if name in models.preset_names() and name not in bundled_names():
        role, place = "student", resolve_device(device)
        net = models.create(name).to(place).eval()
    else:
        role, net = read_config(find(name)).get("role", "student"), models.load(name, device)
    size = f"{net.img_channels}x{net.img_resolution}x{net.img_resolution}"
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    before = launches(net, dtype=dtype).total()
    generator = ImageGenerator(net, role, dtype=dtype, consume=True)
    generator([0])
    inner = generator.net
    facts = {
        "network": f"{type(net).__name__}, {size}, {inner.label_dim} classes, {millions:.1f} million parameters",
        "launches of a forward": f"{before} plain, {inner.launches().total()} optimized, counted for a GPU",
        "inference copy": f"{dtype_name}, {len(inner.program.operations)} operations, {_mib(inner.nbytes)}",
        "conditioning": f"{_mib(inner.conditioning_bytes)} for the default sampler, {generator.sampler}",
    }
    if generator.device.type == "cuda":
        facts["captured"] = f"{_mib(generator.engine.graphs.captured_bytes)} for a batch of 1"
    return facts


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


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
        "built with": extension.built_with() or {"note": "none: no build has been run"},
        "devices": devices,
        "operations": overview.operations(),
        "machine code": machine_code(),
        "CUDA graphs": _graphs(),
        "networks": {"bundled": ", ".join(bundled_names()) or "none", "presets": ", ".join(preset_names())},
        "switches": switches or {"SIGN_FAST_*": "none set"},
    }

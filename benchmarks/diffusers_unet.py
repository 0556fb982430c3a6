"""How long does a call of Stable Diffusion's UNet take, plain and accelerated? Run with --help for the arguments.

The published configurations with random weights: time does not depend on values, and nothing has to be downloaded. All
providers have the same weights, share those whose memory format they agree in, and answer the same input; their outputs
are compared before anything is timed; then they take turns, and medians are reported.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

from sign_fast.errors import SignFastError, first_line
from sign_fast.integrations.diffusers.published import UNETS

PROVIDERS = ("plain", "channels_last", "compile", "sign_fast", "sign_fast_compile")
SECONDS, QUICK_SECONDS = 60.0, 0.0
MIN_ROUNDS = 3
# of outputs, relative to plain's root mean square: roundings of other orders of summation through some 100 layers
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
_BLOCK = 1 << 20

Calls = dict[str, Callable[[], Any]]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--network", type=click.Choice(list(UNETS)), default="sd15", show_default=True)
@click.option("--size", type=click.IntRange(min=8), help="Side of the latents.  [default: the published; on a CPU 32]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--transformer-layers", type=click.IntRange(min=1), help="At most so many a block: another network.")
@click.option("--dtype", type=click.Choice(list(LIMITS)), help="[default: bfloat16, on a CPU float32]")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [default: PyTorch's]")
@click.option("--providers", default="plain,channels_last,sign_fast", show_default=True, help=f"Of {PROVIDERS}.")
@click.option("--seconds", type=click.FloatRange(min=0), help="Of timing.  [default: 60, with --quick 0: three rounds]")
@click.option("--rounds", type=click.IntRange(min=1), default=MIN_ROUNDS, show_default=True, help="At least.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and input.")
@click.option("--outdir", type=click.Path(path_type=Path), default="out/diffusers_unet", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report, not the table.")
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), help="CSV file to append to.")
@click.option("--no-ledger", is_flag=True, help="Append nowhere.")
@click.option("--quick", is_flag=True, help="Three rounds; appends to no ledger unless one is named.")
def diffusers_unet(
    network: str,
    size: int | None,
    batch: int,
    transformer_layers: int | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    providers: str,
    seconds: float | None,
    rounds: int,
    seed: int,
    outdir: Path,
    as_json: bool,
    ledger: Path | None,
    no_ledger: bool,
    quick: bool,
) -> None:
    """Milliseconds of a UNet call, by provider."""
    if threads is not None:  # before torch is imported
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    from benchmarks import ledger as book
    from benchmarks.measure import summary, take_turns
    from benchmarks.report import table
    from sign_fast.checkpoints.atomic import make_folder, write_text
    from sign_fast.checkpoints.store import resolve_device
    from sign_fast.integrations.diffusers.versions import require_diffusers

    if threads is not None:
        torch.set_num_threads(threads)
    version = require_diffusers().__version__
    where = str(resolve_device(device))
    on_cpu = where == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    names = list(dict.fromkeys(providers.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise SignFastError(f"unknown provider {unknown[0]!r}: known: {', '.join(PROVIDERS)}")
    side = size or (32 if on_cpu else UNETS[network]["sample_size"])
    if side % 8:
        raise SignFastError(f"--size {side} does not halve three times: name a multiple of 8")
    target = ledger if ledger is not None else None if no_ledger or quick else book.DEFAULT
    make_folder(outdir)

    label = f"{network}@{side}" + (f"/{transformer_layers}" if transformer_layers else "")
    net = build(network, getattr(torch, dtype), where, seed, transformer_layers)
    count = sum(p.numel() for p in net.parameters())
    given = inputs(net, batch, side, seed)
    calls, report = providers_of(net, names, given)
    errors = compare(calls, dtype)
    times = take_turns(
        {name: _timed(call, where) for name, call in calls.items()},
        seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS,
        rounds,
    )
    facts = {
        **book.environment(where),
        "mode": "diffusers",
        "preset": label,
        "weights": "random",
        "sampler": f"UNet call, diffusers {version}",
        "steps": 1,
        "dtype": dtype,
        "parameters": count,
    }
    rows = [
        {**facts, "batch": batch, "provider": name, **figures, "relative_error": errors[name]}
        for name, figures in summary(times, batch).items()
    ]
    text = json.dumps({**facts, "rows": rows, "changed": report}, indent=1)
    write_text(outdir / "diffusers_unet.json", text + "\n")
    if as_json:
        click.echo(text)
    else:
        click.echo(
            f"diffusers {version}: a call of {label}, {count / 1e6:.0f} M random weights, {dtype}, batch {batch}"
        )
        click.echo(f"{facts['device']}, {facts['threads']} thread(s), torch {facts['torch']}, C++ {facts['extension']}")
        click.echo(table(rows))
    if target is not None:
        book.append(target, rows)


def build(network: str, dtype: Any, device: str, seed: int, transformer_layers: int | None = None) -> Any:
    """The network in eval mode, with random weights of unit gain, in diffusers' own memory format.

    Args:
        network: a name of `published.UNETS`.
        transformer_layers: cut deeper transformers to so many layers.
    """
    import torch
    from diffusers import UNet2DConditionModel

    configuration = dict(UNETS[network])
    if transformer_layers is not None:
        depths = configuration.get("transformer_layers_per_block", 1)
        depths = depths if isinstance(depths, list) else [depths] * 4
        configuration["transformer_layers_per_block"] = [min(depth, transformer_layers) for depth in depths]
    with torch.device("meta"):
        net = UNet2DConditionModel(**configuration)
    net = torch.nn.Module.to(net, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator).to(device, dtype)  # repeated: billions of draws take minutes
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1 if "norm" in name and name.endswith("weight") else 0)
            continue
        flat = parameter.view(-1)
        for start in range(0, len(flat), _BLOCK):
            part = flat[start : start + _BLOCK]
            torch.mul(block[: len(part)], parameter[0].numel() ** -0.5, out=part)
    return net


def inputs(net: Any, batch: int, side: int, seed: int) -> dict[str, Any]:
    """Arguments of a call: latents, one time for each image, a text of 77 tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(net.device, net.dtype)

    given: dict[str, Any] = {
        "sample": draw(batch, net.config.in_channels, side, side),
        "timestep": torch.full((batch,), 500, device=net.device),
        "encoder_hidden_states": draw(batch, 77, net.config.cross_attention_dim),
    }
    if net.config.addition_embed_type == "text_time":
        given["added_cond_kwargs"] = {"text_embeds": draw(batch, 1280), "time_ids": draw(batch, 6)}
    return given


def twin(net: Any) -> Any:
    """A copy that shares the parameters whose memory is the same in both memory formats."""
    import torch

    shared = (p for p in net.parameters() if p.ndim != 4 or p.is_contiguous(memory_format=torch.channels_last))
    return copy.deepcopy(net, {id(p): p for p in shared})


def providers_of(net: Any, names: list[str], given: dict[str, Any]) -> tuple[Calls, str]:
    """Each provider's call, and what `accelerate` reports."""
    import torch

    from sign_fast.integrations.diffusers import accelerate

    report = ""
    formatted: Any = None
    calls: Calls = {}

    def call(model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> Any:
            return model(**given).sample

        return run

    for name in dict.fromkeys(["plain", *names]):
        if name == "plain":
            calls[name] = call(net)
            continue
        if name == "compile":
            calls[name] = call(torch.compile(net))
            continue
        if formatted is None:
            formatted = twin(net).to(memory_format=torch.channels_last)
        if name == "channels_last":
            calls[name] = call(formatted)
            continue
        model = twin(formatted)  # which is in channels_last: all weights are shared
        report = str(accelerate(model))
        calls[name] = call(torch.compile(model) if name == "sign_fast_compile" else model)
    return calls, report


def compare(calls: Calls, dtype: str) -> dict[str, float]:
    """The root mean square of each provider's difference from plain's output, in plain's; runs each once.

    Raises:
        SignFastError: it is beyond what roundings make.
    """
    outputs = {name: call().double() for name, call in calls.items()}
    plain = outputs["plain"]
    errors = {name: ((y - plain).square().mean() / plain.square().mean()).sqrt().item() for name, y in outputs.items()}
    for name, error in errors.items():
        if not error <= LIMITS[dtype]:
            raise SignFastError(f"{name} differs from plain by {error:.2e} of its root mean square: nothing is timed")
    return errors


def _timed(call: Callable[[], Any], device: str) -> Callable[[int], float]:
    import torch

    def run(turn: int) -> float:
        before = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - before

    return run


def main() -> None:
    """Run; foreseen errors are one line and a non-zero exit status."""
    try:
        diffusers_unet.main(prog_name="diffusers_unet.py", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"diffusers_unet: error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except SignFastError as error:
        click.echo(f"diffusers_unet: error: {first_line(error)}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("diffusers_unet: interrupted, nothing was written", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()

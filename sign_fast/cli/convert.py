"""`sign-fast convert`: a published snapshot, or any network that can be loaded, as a folder of this library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ..errors import SignFastError

_KEPT = ("trained", "quality", "source")
_STUDENT = {"steps": 1, "sigma": 2.5}  # SiD's one-step generation


@click.command()
@click.argument("network")
@click.argument("outdir", type=click.Path(path_type=Path))
@click.option("--key", help="The snapshot's entry.  [default: ema]")
@click.option(
    "--role", type=click.Choice(["teacher", "student"]),
    help="How images are made with it.  [default: as the snapshot, its name or the folder says]",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: teacher 18, student 1]")
@click.option("--sigma", type=click.FloatRange(min=0, min_open=True), help="Input noise level (student; 2.5).")
def convert(
    network: str, outdir: Path, key: str | None, role: str | None, steps: int | None, sigma: float | None
) -> None:
    """Write NETWORK as OUTDIR: config.json, model.safetensors and a model card.

    NETWORK is a published EDM, SiD or SiDA snapshot (.pkl), a network's folder, a bundled name, or a repository of the
    Hub. Nothing in a snapshot is run: its classes are known by name, and whatever else it names is refused.

    \b
    sign-fast convert edm-cifar10-32x32-uncond-vp.pkl networks/cifar10
    sign-fast convert network-snapshot-1.200000-403968.pkl networks/sid --role student
    """
    from ..checkpoints.card import model_card
    from ..checkpoints.store import check_replaceable, find, read_network, save_network

    place = find(network)
    target = outdir.resolve()
    if place.resolve() == target:
        raise SignFastError(f"{outdir} is the network itself: name another folder to write to")
    check_replaceable(target)
    if key is not None and not place.is_file():
        raise SignFastError(f"--key names an entry of a published snapshot, which {network} is not: leave it away")
    config, _, state = read_network(place, key)
    facts = _facts(place, config, role, steps, sigma)
    facts |= {name: config[name] for name in _KEPT if name in config}
    if place.is_file():
        facts["source"] = _source(place, key)
    card = model_card(target.name, {**config, **facts}, hub=True)
    save_network(target, state, config["cls"], config["kwargs"], card=card, **facts)
    millions = sum(value.numel() for value in state.values()) / 1e6
    guessed = "" if role or not place.is_file() else ", as its name or its loss says (--role to change)"
    click.echo(f"{config['cls']}, {millions:.1f} million values, a {facts['role']}{guessed}, in {outdir}")


def _facts(
    place: Path, config: dict[str, Any], role: str | None, steps: int | None, sigma: float | None
) -> dict[str, Any]:
    """role, and sampling where it is not the teacher's own.

    Raises:
        SignFastError: it is not known what the network is, or an option is of the other kind.
    """
    role = role or config.get("role") or (None if place.is_file() else "student")
    if role is None:
        raise SignFastError(f"{place} does not tell what it is: say --role teacher or --role student")
    time_free = config["cls"] == "IdempotentPrecond"
    if time_free and role == "teacher":
        raise SignFastError(f"{place} takes no noise level and cannot be a teacher: leave --role away")
    if sigma is not None and (role == "teacher" or time_free):
        raise SignFastError("--sigma is the input noise level of a student with a time input: leave it away")
    before = config.get("sampling", {}) if role == config.get("role", role) else {}
    sampling = dict(before)
    if role == "student" and not time_free:
        sampling = {**_STUDENT, **before}
    if sigma is not None and not math.isfinite(sigma):
        raise SignFastError(f"--sigma must be a finite number, not {sigma}")
    if steps is not None:
        sampling["steps"] = steps
    if sigma is not None:
        sampling["sigma"] = sigma
    return {"role": role, "sampling": sampling} if sampling else {"role": role}


def _source(place: Path, key: str | None) -> dict[str, Any]:
    import hashlib

    from ..checkpoints.published import DEFAULT_KEY

    digest = hashlib.sha256()
    with open(place, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {
        "file": place.name,
        "sha256": digest.hexdigest(),
        "entry": key or DEFAULT_KEY,
        "format": "a published snapshot (EDM, SiD, SiDA)",
    }

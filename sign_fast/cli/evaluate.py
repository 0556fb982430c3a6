"""`sign-fast evaluate`: how good a generator's images are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import SignFastError
from .processes import device_for, process_group, this_process

_SAMPLER_NAMES = {"edm": "Heun", "few_step": "few-step", "recursive": "recursive"}
_LABELS = {
    "fid": ("FID", 3),
    "kid": ("KID", 6),
    "kid_std": ("KID deviation", 6),
    "is": ("inception score", 3),
    "is_std": ("inception score deviation", 3),
    "precision": ("precision", 4),
    "recall": ("recall", 4),
}


@click.command()
@click.option("--network", help="Folder or bundled name of the generator.")
@click.option("--images", help="Folder, zip or .npz of images, or 'digits', instead of --network.")
@click.option("--metric", help="Of fid, kid, is, precision, recall; with commas between.  [default: fid]")
@click.option("--reference", help="Real images or their statistics: .npz, .safetensors, folder, zip or 'digits'.")
@click.option(
    "--inception", type=click.Path(path_type=Path), help="TorchScript network.  [default for 8×8 digits: their own]"
)
@click.option("--num", type=click.IntRange(min=2), help="Images.  [default: 2000 digits, 50000 with --inception]")
@click.option("--seeds", metavar="LIST", help="Seeds, e.g. 50000-99999.  [default: 0 to NUM-1]")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: the network's own]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the generator.")
@click.option("--batch", type=click.IntRange(min=1), default=250, show_default=True, help="Images a batch.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--kid-subsets", type=click.IntRange(min=1), default=100, show_default=True, help="Subsets of KID.")
@click.option("--kid-subset-size", type=click.IntRange(min=2), help="Images of each.  [default: 1000, or all if fewer]")
@click.option("--kid-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the subsets.")
@click.option("--splits", type=click.IntRange(min=1), default=10, show_default=True, help="Of the inception score.")
@click.option("--neighbours", type=click.IntRange(min=1), default=3, show_default=True, help="Of precision and recall.")
@click.option("--save-reference", type=click.Path(path_type=Path), help="Write mu and sigma of the images, as .npz.")
@click.option("--save-features", is_flag=True, help="Features too, with --save-reference: for kid, precision, recall.")
@click.option("--record", is_flag=True, help="Write the result into the network's config.json and model card.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def evaluate(
    network: str | None,
    images: str | None,
    metric: str | None,
    reference: str | None,
    inception: Path | None,
    num: int | None,
    seeds: str | None,
    steps: int | None,
    dtype: str | None,
    batch: int,
    device: str | None,
    kid_subsets: int,
    kid_subset_size: int | None,
    kid_seed: int,
    splits: int,
    neighbours: int,
    save_reference: Path | None,
    save_features: bool,
    record: bool,
    as_json: bool,
) -> None:
    """Distances of a generator's images, or of any, to real ones on the features of a network; see docs/metrics.md.

    8×8 digits are measured without further files. All else needs --inception, whose TorchScript runs: use a file that
    you trust. Under torchrun the images are spread over the processes.

    \b
    sign-fast evaluate --network digits-uncond
    sign-fast evaluate --network DIR --inception inception-2015-12-05.pt --reference cifar10-32x32.npz
    torchrun --nproc-per-node 4 -m sign_fast.cli evaluate --images DIR --metric kid,precision,recall ...
    """
    from ..checkpoints.store import bundled_names, resolve_device
    from ..metrics.evaluation import Protocol, check_metrics
    from ..metrics.reference import check_ending
    from ..training.processes import raised_together

    if (network is None) == (images is None):
        raise SignFastError("give either --network or --images")
    if network is None:
        given = {"--record": record, "--seeds": seeds, "--steps": steps, "--dtype": dtype}
        if wrong := [name for name, value in given.items() if value]:
            raise SignFastError(f"{', '.join(wrong)} go with --network")
    if save_features and save_reference is None:
        raise SignFastError("--save-features goes with --save-reference")
    if save_reference is not None:
        if not check_ending(save_reference).parent.is_dir():
            raise SignFastError(f"no folder {save_reference.parent} to write {save_reference.name} to: make it first")
        # a reference is made without another, unless something is asked for
        metrics = [] if metric is None and reference is None else check_metrics(metric or "fid")
    else:
        metrics = check_metrics("fid" if metric is None else metric)
    if metrics == ["is"] and reference is not None:
        raise SignFastError(
            "the inception score compares with nothing: leave --reference away, or name a --metric more"
        )
    if record and not metrics:
        raise SignFastError("--record needs something to record: name a --metric")
    if record and network is not None and network not in bundled_names() and not Path(network).is_dir():
        raise SignFastError(f"--record writes into a network's folder, which {network} is not: convert it to one first")
    protocol = Protocol(kid_subsets, kid_subset_size, kid_seed, splits, neighbours)

    process = this_process()
    where = resolve_device(device_for(process, device))
    with process_group(process, where.type):
        with raised_together(where):
            job = _Job(metrics, protocol, inception, reference, where, batch, process)
            job.open(network, images, num, seeds, steps, dtype)
            job.check()
        of_reference = job.reference_features()
        found = job.image_features(save_reference is not None, save_features)
    if not process.first:
        return
    figures = job.values(found, of_reference)
    facts = {**figures, **job.facts}
    try:
        if record and network is not None:
            from ..checkpoints.card import record as write_card

            write_card(network, quality=facts)
        if save_reference is not None:
            from ..metrics.reference import save_reference as write_reference

            write_reference(save_reference, found, job.detector, features=save_features)
            facts = {**facts, "saved": str(save_reference)}
    finally:  # hours of work are not lost to a full disk
        click.echo(json.dumps(facts, ensure_ascii=False) if as_json else _line(facts))


def _line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


class _Job:
    """One evaluation: what is measured, with what, against what."""

    def __init__(
        self,
        metrics: list[str],
        protocol: Any,
        inception: Path | None,
        reference: str | None,
        device: Any,
        batch: int,
        process: Any,
    ) -> None:
        from ..metrics.evaluation import choose_detector, choose_reference

        self.metrics, self.protocol, self.device, self.batch, self.process = metrics, protocol, device, batch, process
        self.detector = choose_detector(inception, device)
        self.digits = inception is None
        self.reference = choose_reference(reference, metrics, self.detector)
        self.facts: dict[str, Any] = {}

    def open(
        self,
        network: str | None,
        images: str | None,
        num: int | None,
        seeds: str | None,
        steps: int | None,
        dtype: str | None,
    ) -> None:
        from ..metrics.images import FirstImages, open_images

        if network is not None:
            self.source: Any = self._generator(network, num, seeds, steps, dtype)
            return
        assert images is not None
        self.source = open_images(images)
        if num is not None:
            self.source = FirstImages(self.source, num)
        self.facts = {"images": len(self.source)}

    def _generator(self, network: str, num: int | None, seeds: str | None, steps: int | None, dtype: str | None) -> Any:
        import torch

        from ..metrics.images import GeneratedImages
        from ..sampling import ImageGenerator
        from ..sampling.noise import check_seeds, parse_seeds

        if seeds is None:
            seeds = f"0-{(num or (2000 if self.digits else 50000)) - 1}"
        numbers = check_seeds(parse_seeds(seeds)[:num])
        if num is not None and len(numbers) < num:
            raise SignFastError(f"--seeds names {len(numbers)} seeds, not {num}: name more, or leave --num away")
        generator = ImageGenerator.from_pretrained(network, self.device, getattr(torch, dtype) if dtype else None)
        steps = generator.default_steps if steps is None else steps
        shown = f"{numbers[0]}-{numbers[-1]}" if numbers == list(range(numbers[0], numbers[-1] + 1)) else seeds
        self.facts = {"images": len(numbers), "seeds": shown, "steps": steps}
        self.facts["sampler"] = _SAMPLER_NAMES[generator.sampler]
        if dtype:
            self.facts["dtype"] = dtype
        return GeneratedImages(generator, numbers, network, steps=steps)

    def check(self) -> None:
        """Everything that can be known before the work begins, and the rest of the facts."""
        from ..metrics.evaluation import check_counts, wanted_of_reference

        width = self.detector.prepare(self.source.shape, self.source.name, "is" in self.metrics)
        check_counts(self.metrics, self.protocol, len(self.source), self.reference)
        if self.reference is not None:
            self.reference.check(self.detector, width)
            wanted_of_reference(self.metrics, self.reference)
            self.facts["reference"] = Path(self.reference.name).name
            if self.reference.sha256 is not None:
                self.facts["reference sha256"] = self.reference.sha256
        self.facts["features of"] = self.detector.name
        self.facts["features sha256"] = self.detector.sha256
        if not self.digits and self.source.shape[0] == 1:
            self.facts["channels"] = "grey, repeated to 3"

    def reference_features(self) -> Any:
        from ..metrics.evaluation import wanted_of_reference

        wanted = None if self.reference is None else wanted_of_reference(self.metrics, self.reference)
        return None if self.reference is None or wanted is None else self._collect(self.reference.images, wanted)

    def image_features(self, moments: bool, features: bool) -> Any:
        from dataclasses import replace

        from ..metrics.evaluation import wanted_of_images

        wanted = wanted_of_images(self.metrics, self.protocol)
        wanted = replace(wanted, moments=wanted.moments or moments, features=wanted.features or features)
        return self._collect(self.source, wanted)

    def _collect(self, source: Any, wanted: Any) -> Any:
        from tqdm import tqdm

        from ..metrics.features import collect, cut, gather
        from ..training.processes import raised_together

        rank, world = self.process.rank, self.process.world
        total = sum(map(len, cut(len(source), self.batch)[rank::world]))
        description = "images" if source is self.source else "reference"
        with (
            raised_together(self.device),
            tqdm(total=total, desc=description, unit="image", disable=not self.process.first) as bar,
        ):
            found = collect(source, self.detector, wanted, batch=self.batch, rank=rank, world=world, seen=bar.update)
        gather(found, self.batch, rank=rank, world=world, device=self.device)
        return found

    def values(self, found: Any, of_reference: Any) -> dict[str, Any]:
        """The figures by the names they are shown under."""
        from ..metrics.evaluation import values

        numbers = values(self.metrics, found, self.reference, of_reference, self.protocol, self.device)
        if "kid" in numbers and self.reference is not None:
            size = self.protocol.kid_subset_size
            counts = [len(self.reference.features)] if self.reference.features is not None else [of_reference.count]
            size = min(1000, found.count, *counts) if size is None else size
            self.facts["KID subsets"] = f"{self.protocol.kid_subsets} of {size}, seed {self.protocol.seed}"
        shown = {}
        for name, value in numbers.items():
            label, places = _LABELS[name]
            # the digits' own features are no Inception's
            shown["Fréchet distance" if name == "fid" and self.digits else label] = round(value, places)
        return shown

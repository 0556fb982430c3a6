"""Leaving one term out: short distillations of each arm, measured as the report measures a student."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sign_fast.data import open_dataset
from sign_fast.distill.networks import load_teacher
from sign_fast.distill.pairs import Pairs, make_pairs, network_hash
from sign_fast.distill.quality import idempotence_and_reconstruction, quality_for, sample_images
from sign_fast.distill.settings import DistillSettings
from sign_fast.distill.trainer import Distiller
from sign_fast.errors import SignFastError
from sign_fast.metrics.digits_classifier import bundled, statistics

from .arms import Results, arms_of, described, environment, over_seeds

_LATENTS = 500


def shortened(settings: DistillSettings, kimg: float) -> DistillSettings:
    """The same run in `kimg`: the ramp of idempotence and the average's half-life shrink in proportion."""
    factor = kimg / settings.kimg
    return dataclasses.replace(
        settings,
        kimg=kimg,
        idem_ramp_kimg=settings.idem_ramp_kimg * factor,
        ema_halflife_kimg=settings.ema_halflife_kimg * factor,
    )


class _SharedPairs:
    """The teacher's pairs by number and seed, made once for all arms, and what that took.

    Args:
        teacher: name of the network.
        device: of the runs.
    """

    def __init__(self, teacher: str, device: torch.device) -> None:
        self.teacher, self.device = teacher, device
        self._made: dict[tuple[int, int], tuple[Pairs, float]] = {}

    def of(self, settings: DistillSettings) -> tuple[Pairs, float] | None:
        """(pairs, seconds), None for a run that needs none."""
        if not settings.needs_pairs:
            return None
        key = (settings.pairs, settings.seed)
        if key not in self._made:
            net, *_ = load_teacher(self.teacher, self.device)
            start = _now(self.device)
            self._made[key] = (make_pairs(net, *key), _now(self.device) - start)
        return self._made[key]


def _now(device: torch.device) -> float:
    """The clock's seconds when all that was enqueued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _run(
    settings: DistillSettings, shared: tuple[Pairs, float] | None, data: str, num: int, device: torch.device
) -> dict[str, Any]:
    distiller = Distiller(settings, None, device, pairs=None if shared is None else shared[0])
    start = _now(device)
    while distiller.iteration < settings.iterations:
        distiller.step()
    seconds = _now(device) - start
    ema = distiller.networks.ema
    shape = (ema.img_channels, ema.img_resolution, ema.img_resolution)
    held_out = open_dataset(data)
    x = torch.stack([torch.from_numpy(held_out.image(i)) for i in range(len(held_out))]).to(device).float() / 127.5 - 1
    labels = None
    if ema.label_dim:
        count = torch.arange(max(len(x), _LATENTS))
        classes = torch.tensor([held_out.label(int(i) % len(x)) for i in count])
        labels = torch.eye(ema.label_dim, device=device)[classes.to(device)]
    z = torch.randn(_LATENTS, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    sampling = {} if shared is None else {"sampling_seconds": shared[1]}
    row: dict[str, Any] = {"seconds": seconds, **sampling, **idempotence_and_reconstruction(ema, x, z, labels)}
    quality = quality_for(shape)
    if quality is not None:
        net, _, real = bundled()
        for k in (1, 2):
            images = sample_images(ema, "recursive", num, steps=k).cpu()
            row[f"frechet_distance_{k}"] = quality(images)
            if k == 1:
                row["diversity"] = float(statistics(net, images).covariance.trace() / real.trace())
    return row


def ablation(
    settings: DistillSettings,
    kimg: float,
    seeds: Sequence[int],
    data: str,
    num: int,
    device: torch.device,
    path: Path,
    arms: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """A row for each arm with means over seeds, and their standard deviations under "spread".

    Args:
        settings: of the full run.
        kimg: length of each arm's.
        seeds: of the runs.
        data: held-out images.
        num: images of a Fréchet distance.
        device: where it runs.
        path: JSON file of the finished runs, which are not run again.
        arms: names of `arms_of` the settings, None for all.
        say: told what is being done.

    Raises:
        SignFastError: settings of another method, or an arm that is not known.
    """
    if settings.method != "sign":
        raise SignFastError(f"the ablation is of SIGN's terms: these settings are of {settings.method}")
    changes = arms_of(settings)
    if unknown := [arm for arm in arms or () if arm not in changes]:
        raise SignFastError(f"no arm {unknown[0]!r}: there are {', '.join(changes)}")
    short, results, rows = shortened(settings, kimg), Results(path), []
    place, pairs = environment(device), _SharedPairs(settings.teacher, device)
    teacher = network_hash(load_teacher(settings.teacher, torch.device("cpu"))[0])
    for arm in arms or changes:
        runs = []
        for seed in seeds:
            chosen = dataclasses.replace(short, seed=seed, **changes[arm])

            def run(arm: str = arm, seed: int = seed, chosen: DistillSettings = chosen) -> dict[str, Any]:
                say(f"ablation: {arm}, seed {seed}, {chosen.iterations} iterations")
                return _run(chosen, pairs.of(chosen), data, num, device)

            key = {**dataclasses.asdict(chosen), "teacher_hash": teacher, "held_out": data, "images": num}
            runs.append(results.get(arm, key, place, run))
        figures = [{k: v for k, v in run.items() if k not in ("arm", "settings", "environment")} for run in runs]
        places = sorted({described(run["environment"]) for run in runs})
        rows.append({"name": arm, "seeds": len(runs), "environments": places, **over_seeds(figures)})
    return rows

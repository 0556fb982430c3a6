"""A small classifier of the 8×8 digits, bundled with the library, whose 64 features measure the quality of digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.atomic import replace_folder, write_text
from ..checkpoints.store import check_state, read_weights
from ..data.datasets import digits
from .frechet import FeatureStatistics, Float64, frechet_distance

HALVES_APART = 18.0
"""Features are scaled so that two halves of the real digits are this Fréchet distance apart (see `train`)."""


class DigitsClassifier(nn.Module):
    """Two convolutions and two linear layers; (B, 1, 8, 8) images in [-1, 1] -> (B, 10) logits."""

    feature_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.out = nn.Linear(64, 10)
        self.register_buffer("feature_scale", torch.ones(()))

    def _hidden(self, images: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(F.relu(self.conv0(images)))), 2)
        return F.relu(self.hidden(h.flatten(1)))

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 64)."""
        return self._hidden(images) * self.feature_scale

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.dropout(self._hidden(images), 0.5, self.training))


def _images(uint8: Tensor) -> Tensor:
    return uint8.float() / 127.5 - 1


def _real() -> tuple[Tensor, Tensor]:
    data = digits()
    images = torch.from_numpy(np.stack([data.image(i) for i in range(len(data))]))
    return images, torch.tensor([data.label(i) for i in range(len(data))])


@torch.no_grad()
def statistics(classifier: DigitsClassifier, uint8: Tensor) -> FeatureStatistics:
    """Feature statistics of (N, 1, 8, 8) uint8 images."""
    found = FeatureStatistics(64)
    for batch in uint8.split(500):
        found.append(classifier.features(_images(batch)).numpy())
    return found


def _distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@dataclass(frozen=True)
class ClassifierReport:
    """What `train` found: accuracy on the held-out fifth, and the median distance of two halves, unscaled."""

    held_out_accuracy: float
    halves_apart: float


def train(folder: Path, seed: int = 0, epochs: int = 60) -> ClassifierReport:
    """Train the classifier and write classifier.safetensors, statistics of the real digits and report.json.

    A fifth of the data is held out of the training, to tell its accuracy. Features get one common factor that puts two
    random halves of the real digits (898 images each) a Fréchet distance of 18 apart, the median of 25 splits: the
    scale on which the project's quality goals are stated.

    Args:
        folder: for the results; replaced in one step.
        seed: of weights, split and order.
        epochs: over the training part.

    Raises:
        SignFastError: scikit-learn is missing, or the folder cannot be written.
    """
    images, labels = _real()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        held_out, used = order[: len(order) // 5], order[len(order) // 5 :]
        net = DigitsClassifier()
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        steps = epochs * -(-len(used) // 64)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for batch in used[torch.randperm(len(used))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(_images(images[batch])), labels[batch], label_smoothing=0.1).backward()
                optimizer.step()
                scheduler.step()
        splits = [torch.randperm(len(images)) for _ in range(25)]
    net.eval().requires_grad_(False)
    accuracy = (net(_images(images[held_out])).argmax(1) == labels[held_out]).float().mean().item()
    half = len(images) // 2
    apart = median(
        _distance(statistics(net, images[p[:half]]), statistics(net, images[p[half : 2 * half]])) for p in splits
    )
    net.feature_scale.fill_((HALVES_APART / apart) ** 0.5)
    real = statistics(net, images)
    report = ClassifierReport(accuracy, apart)

    def fill(temporary: Path) -> None:
        save_file(dict(net.state_dict()), temporary / "classifier.safetensors")
        moments = {"mu": torch.from_numpy(real.mean), "sigma": torch.from_numpy(real.covariance)}
        save_file(moments, temporary / "statistics.safetensors")
        facts = {
            "command": f"sign-fast train-digits-classifier --outdir OUT --seed {seed}",
            "held_out_accuracy": round(accuracy, 4),
            "unscaled_distance_of_two_halves": round(apart, 4),
            "images": real.count,
        }
        write_text(temporary / "report.json", json.dumps(facts, indent=1) + "\n")

    replace_folder(folder, fill)
    return report


@lru_cache(maxsize=1)
def bundled() -> tuple[DigitsClassifier, Float64, Float64]:
    """The bundled classifier in eval mode, and mean (64,) and covariance (64, 64) of the 1,797 real digits."""
    folder = Path(str(files(__package__).joinpath("digits")))
    net = DigitsClassifier()
    state = read_weights(folder / "classifier.safetensors")
    check_state(state, net.state_dict(), folder / "classifier.safetensors")
    net.load_state_dict(state)
    moments = read_weights(folder / "statistics.safetensors")
    return net.eval().requires_grad_(False), moments["mu"].numpy(), moments["sigma"].numpy()


def digits_distance(uint8: Tensor) -> float:
    """Fréchet distance of (N, 1, 8, 8) uint8 images to all 1,797 real digits, on 64 features.

    Args:
        uint8: at least 2 images; 2,000 is the usual number, distances at other numbers do not compare.
    """
    net, mu, sigma = bundled()
    found = statistics(net, uint8)
    return frechet_distance(found.mean, found.covariance, mu, sigma)

"""TorchScript networks with the interface of the published Inception file, small enough for tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES, CLASSES = 24, 7


class StandIn(nn.Module):
    """Resizes inside, as the published file does; features (N, 24), probabilities (N, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.layer = nn.Linear(6 * 16, FEATURES)
        self.output = nn.Linear(FEATURES, CLASSES)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        x = torch.nn.functional.interpolate(img.to(torch.float32), size=[16, 16], mode="bilinear") / 127.5 - 1
        x = torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), [4, 4])
        features = torch.relu(self.layer(x.flatten(1) * 40))  # so that features and probabilities differ
        if return_features:
            return features
        weight = self.output.weight
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return torch.nn.functional.linear(features, weight, bias).softmax(1)


class Logits(StandIn):
    """Gives logits, and knows no further argument."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:  # type: ignore[override]
        x = torch.nn.functional.adaptive_avg_pool2d(img.to(torch.float32) / 127.5 - 1, [4, 4])
        features = torch.relu(self.layer(x.flatten(1).repeat(1, 2)))
        return features if return_features else self.output(features)


class Plain(nn.Module):
    """Features of floats only, as a traced network may be."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            raise ValueError("floats only")
        return torch.nn.functional.adaptive_avg_pool2d(x / 255, [2, 2]).flatten(1)


class Maps(nn.Module):
    """Features of the wrong rank."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32)


class Broken(nn.Module):
    """Fails on every image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 1, 1, 7)


class DarkIsNaN(nn.Module):
    """NaN where an image is all black."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.adaptive_avg_pool2d(x.to(torch.float32), [2, 2]).flatten(1)
        return y / (y.sum(1, keepdim=True) > 0).to(torch.float32)


class Text(nn.Module):
    """Returns no tensor."""

    def forward(self, x: Tensor) -> str:
        return "features"


def write(path: Path, cls: type[nn.Module] = StandIn, seed: int = 0) -> Path:
    """The network as a TorchScript file."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(seed)
        torch.jit.script(cls().eval()).save(str(path))
    return path

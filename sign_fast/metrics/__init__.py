"""How good images are: Fréchet and kernel distance, Inception score, precision and recall, on features of a network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detectors import Detector, DigitsDetector, InceptionDetector
    from .evaluation import Protocol, check_metrics, evaluate
    from .features import Collected, collect
    from .frechet import FeatureStatistics, frechet_distance
    from .images import GeneratedImages, ImageSource, open_images
    from .kernel import kernel_distance
    from .manifold import precision_recall
    from .reference import Reference, read_reference, save_reference
    from .score import ScoreSums, inception_score

_LAZY = {
    "Collected": "features",
    "Detector": "detectors",
    "DigitsDetector": "detectors",
    "FeatureStatistics": "frechet",
    "GeneratedImages": "images",
    "ImageSource": "images",
    "InceptionDetector": "detectors",
    "Protocol": "evaluation",
    "Reference": "reference",
    "ScoreSums": "score",
    "check_metrics": "evaluation",
    "collect": "features",
    "evaluate": "evaluation",
    "frechet_distance": "frechet",
    "inception_score": "score",
    "kernel_distance": "kernel",
    "open_images": "images",
    "precision_recall": "manifold",
    "read_reference": "reference",
    "save_reference": "reference",
}
__all__ = [
    "Collected",
    "Detector",
    "DigitsDetector",
    "FeatureStatistics",
    "GeneratedImages",
    "ImageSource",
    "InceptionDetector",
    "Protocol",
    "Reference",
    "ScoreSums",
    "check_metrics",
    "collect",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "open_images",
    "precision_recall",
    "read_reference",
    "save_reference",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

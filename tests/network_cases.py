"""Small networks of every kind, weights drawn so that no layer hides another's mistakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sign_fast import models
from tests.golden_rules import fill, normal

_SONG: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "augment_dim": 9,
}
_FIR: dict[str, Any] = {"resample_filter": [1, 3, 3, 1]}
_NCSN: dict[str, Any] = {"embedding_type": "fourier", "channel_mult_noise": 2, **_FIR}
_ADM: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
}

# name: class, arguments
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("EDMPrecond", _SONG),
    "ddpmpp-cond": ("EDMPrecond", {**_SONG, "label_dim": 3, "attn_resolutions": [16, 8]}),
    "ddpmpp-two-blocks": ("VPPrecond", {**_SONG, "num_blocks": 2, "channel_mult": [2, 1, 1]}),
    "ddpmpp-no-blocks": ("EDMPrecond", {**_SONG, "num_blocks": 0}),
    "ddpmpp-no-blocks-fir": ("EDMPrecond", {**_SONG, **_FIR, "num_blocks": 0}),
    "ncsnpp": ("VEPrecond", {**_SONG, **_NCSN, "encoder_type": "residual", "channel_mult": [1, 1, 2]}),
    "residual-box": ("EDMPrecond", {**_SONG, "encoder_type": "residual"}),
    "skip-fir": ("VEPrecond", {**_SONG, **_NCSN, "encoder_type": "skip", "decoder_type": "skip", "label_dim": 2}),
    "skip-box": ("EDMPrecond", {**_SONG, "encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 1]}),
    "skip-iddpm": ("iDDPMPrecond", {**_SONG, "decoder_type": "skip"}),
    "adm-cond": ("EDMPrecond", {**_ADM, "label_dim": 4}),
    "adm-iddpm": ("iDDPMPrecond", {**_ADM, "channel_mult": [1, 1], "attn_resolutions": [16, 8]}),
}


def network(name: str, seed: int = 1) -> models.Precond:
    """In eval mode, without gradients."""
    cls, kwargs = NETWORKS[name]
    net = getattr(models, cls)(**kwargs)
    return fill(net, seed).eval().requires_grad_(False)  # type: ignore[return-value]


def inputs(net: models.Precond, batch: int = 2, seed: int = 5) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, a noise level for each image, and one-hot labels where there are classes."""
    sigma = torch.tensor([0.3, 2.5, 20.0, 70.0])[:batch]
    x = normal(seed, batch, net.img_channels, net.img_resolution, net.img_resolution) * sigma.reshape(-1, 1, 1, 1)
    labels = torch.eye(net.label_dim)[torch.arange(batch) % net.label_dim] if net.label_dim else None
    return x, sigma, labels

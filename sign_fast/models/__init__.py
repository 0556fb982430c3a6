"""The published networks, drop-in: class names, arguments, attributes and state of EDM, SiD and SiDA."""

from __future__ import annotations

import os

import torch

from ..nn import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding
from .idempotent import IdempotentPrecond
from .precond import EDMPrecond, Precond, VEPrecond, VPPrecond, iDDPMPrecond
from .presets import create, preset_names
from .unet_block import UNetBlock
from .unets import DhariwalUNet, SongUNet


def load(path_or_name: str | os.PathLike[str], device: str | torch.device | None = None) -> Precond:
    """A trained network in eval mode, by folder, file or name.

    Args:
        path_or_name: a folder with config.json and model.safetensors; a published snapshot of EDM, SiD or SiDA (.pkl,
            its "ema" network; nothing that it carries is run); a bundled name such as "digits-uncond"; or, with
            huggingface_hub installed, a repository of the Hub such as "user/name".
        device: where to put it; None means CUDA where there is one, else the CPU.

    Returns:
        The network, eval mode, parameters frozen, convolution weights in channels_last.

    Raises:
        SignFastError: no such folder, file or name, or its content does not fit: one line, what and how to mend it.
    """
    from ..checkpoints.store import load_network

    return load_network(path_or_name, device)


__all__ = [
    "Conv2d",
    "DhariwalUNet",
    "EDMPrecond",
    "FourierEmbedding",
    "GroupNorm",
    "IdempotentPrecond",
    "Linear",
    "PositionalEmbedding",
    "Precond",
    "SongUNet",
    "UNetBlock",
    "VEPrecond",
    "VPPrecond",
    "create",
    "iDDPMPrecond",
    "load",
    "preset_names",
]

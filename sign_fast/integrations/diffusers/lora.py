"""LoRAs of a pipeline: read from safetensors alone, all of one or nothing, into every text encoder that there is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import SignFastError
from .versions import require_diffusers

_diffusers: Any = require_diffusers()
_loaders: Any = importlib.import_module("diffusers.loaders")

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file of a folder that a LoRA is read from where none is named, as diffusers' trainers write it."""


class LoraMixin(_loaders.StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """What StableDiffusionPipeline does with LoRAs, or SDXL's where there are two text encoders."""

    _lora_loadable_modules = ["unet", "text_encoder", "text_encoder_2"]  # noqa: RUF012
    unet: Any
    text_encoder_2: Any

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **options: Any) -> None:
        """As StableDiffusionPipeline's, or SDXL's where there are two text encoders: from a file, a folder or a dict.

        Raises:
            SignFastError: pickled, not on this machine, or no LoRA of this pipeline; it is as it was then.
        """
        if not options.setdefault("use_safetensors", True):
            raise SignFastError("use_safetensors=False would read pickles, which can run code: leave it away")
        given = pretrained_model_name_or_path_or_dict
        named = "the dict" if isinstance(given, dict) else _file(given, options)
        if importlib.util.find_spec("peft") is None:
            raise SignFastError("LoRAs need peft, which is not installed: pip install 'sign-fast[diffusers]'")
        kind = "StableDiffusionLoraLoaderMixin" if self.text_encoder_2 is None else "StableDiffusionXLLoraLoaderMixin"
        before = {name: _adapters(model) for name, model in self._lora_models()}
        try:
            given = given if isinstance(given, dict) else str(given)
            getattr(_loaders, kind).load_lora_weights(self, given, *args, **options)
        except Exception as error:  # whatever a damaged file makes another library raise
            self._remove_since(before)
            raise SignFastError(
                f"{named} cannot be loaded as a LoRA of this pipeline ({_first_lines(error)}): name one of its networks"
            ) from error
        if not options.get("hotswap") and all(_adapters(m) == before[name] for name, m in self._lora_models()):
            raise SignFastError(
                f"{named} has no weights for this pipeline's {' and '.join(before)}: name a LoRA of its kind of network"
            )

    def fuse_lora(self, components: Sequence[str] | None = None, *args: Any, **options: Any) -> None:
        """As diffusers', by default into all networks that LoRAs are loaded into, SDXL's second encoder among them."""
        super().fuse_lora(self._lora_names() if components is None else components, *args, **options)

    def unfuse_lora(self, components: Sequence[str] | None = None, **options: Any) -> None:
        """The inverse of `fuse_lora`."""
        super().unfuse_lora(self._lora_names() if components is None else components, **options)

    def _lora_models(self) -> list[tuple[str, Any]]:
        found = [(name, getattr(self, name)) for name in self._lora_loadable_modules]
        return [(name, model) for name, model in found if model is not None]

    def _lora_names(self) -> list[str]:
        return [name for name, _ in self._lora_models()]

    def _remove_since(self, before: dict[str, set[str]]) -> None:
        """Take away what a load that failed has added."""
        if not any(before.values()):
            self.unload_lora_weights()
            return
        delete = importlib.import_module("diffusers.utils").delete_adapter_layers
        for name, model in self._lora_models():
            for adapter in sorted(_adapters(model) - before[name]):
                delete(model, adapter)


def has_adapters(network: nn.Module) -> bool:
    """Whether there are adapters in a network, which its saved weights would lack."""
    return any(".base_layer." in key for key in network.state_dict())


def _adapters(model: Any) -> set[str]:
    return set(getattr(model, "peft_config", None) or ())


def _file(given: Any, options: dict[str, Any]) -> Path:
    """The file of a LoRA that is named by itself or by its folder."""
    named = Path(given)
    if not named.exists():
        raise SignFastError(f"no LoRA at {named}: nothing is fetched, name a file or folder on this machine")
    if named.is_dir():
        named = named / (options.get("subfolder") or "") / options.setdefault("weight_name", LORA_WEIGHTS)
    if named.suffix != ".safetensors" or not named.is_file():
        raise SignFastError(f"{named} is no safetensors file on this machine: a LoRA is read from one")
    return named


def _first_lines(error: BaseException) -> str:
    """The first line of an error's text, and the next where it is a heading."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])

"""What iterations read: prompts' embeddings and real latents, computed once to disk and read by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...data.image_text import ImageTextFolder
from ...data.order import indices_at
from ...integrations.diffusers.parts import Parts
from ...integrations.diffusers.prompts import PromptEncoder
from ...sampling.text import TextConditioning
from ...training.loop import PRECISIONS
from ...training.seeds import seed_of
from ..pairs import network_hash
from .rows import Made, Rows, key_of, write_rows
from .settings import TextToImageSettings

_CHUNK, _ENCODED = 32, 4  # prompts and images that are encoded at a time: always the same rows together
_TEXT_SHARD, _LATENT_SHARD = 1024, 1024
_CONFIG = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")  # what weights do not say
_ORDER_OF_PROMPTS, _ORDER_OF_IMAGES = 21, 22  # streams of random numbers


class TextSource:
    """A pipeline's text encoders and their embeddings of prompts, on disk.

    Args:
        parts: of the pipeline, the text encoders in float32.
        settings: of the run: precision, in which embeddings are kept, and which the networks would round them to.
        resolution: of the images in pixels, which SDXL is told.

    Attributes:
        facts: of the encoders, as JSON holds them; the same with every version of transformers.
    """

    def __init__(self, parts: Parts, settings: TextToImageSettings, resolution: int) -> None:
        self.encoder: PromptEncoder | None = PromptEncoder(parts)
        self._models = [parts.text_encoder] + [parts.text_encoder_2] * (parts.text_encoder_2 is not None)
        tokenizers = [t for t in (parts.tokenizer, parts.tokenizer_2) if t is not None]
        self.facts = {
            "encoders": [[network_hash(m), *(getattr(m.config, name) for name in _CONFIG)] for m in self._models],
            "vocabularies": [key_of(sorted(t.get_vocab().items())) for t in tokenizers],
            "zeros": bool(parts.settings.get("force_zeros_for_empty_prompt", False)),
        }
        self._rules = [_rules_of(t) for t in tokenizers]
        self.dtype = PRECISIONS[settings.precision]
        self.resolution = resolution

    def key(self, prompts: list[str]) -> str:
        """A hash of the prompts and of all that makes their embeddings as they are kept."""
        return key_of({**self.facts, "tokenizers": self._rules, "dtype": str(self.dtype)}, prompts)

    def write(self, root: Path, prompts: list[str], device: torch.device, done: Callable[[int], None]) -> Text:
        """The embeddings of prompts, made where they are not there yet. All processes call it."""
        assert self.encoder is not None, "the text encoders have been dropped"
        encoder, folder = self.encoder, root / f"text-{self.key(prompts)[:32]}"

        def make(start: int, stop: int) -> Made:
            for model in self._models:
                model.to(device)
            parts = [encoder.encode(prompts[start:stop], chunk=_CHUNK).tensors()] if start < len(prompts) else []
            if stop > len(prompts):
                parts.append(encoder.unconditional().tensors())
            return {
                name: torch.cat([p[name] for p in parts]).to(self.dtype)
                for name in ("states", "pooled")
                if name in parts[0]
            }

        write_rows(folder, len(prompts) + 1, make, device, _TEXT_SHARD, done)
        size = torch.tensor([[self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]])
        time_ids = size.float().to(device) if len(self._models) > 1 else None
        return Text(Rows(folder), time_ids, device)

    def drop(self) -> None:
        """Let the text encoders go."""
        self.encoder, self._models = None, []


class Text:
    """Prompts' embeddings by their numbers.

    Args:
        rows: of the prompts, and last of the unconditional one.
        time_ids: (1, 6) of SDXL, or None.
        device: where they go.
    """

    def __init__(self, rows: Rows, time_ids: Tensor | None, device: torch.device) -> None:
        self._rows, self._time_ids, self._device = rows, time_ids, device

    def __len__(self) -> int:
        return len(self._rows) - 1

    def at(self, numbers: npt.NDArray[np.int64] | list[int]) -> TextConditioning:
        """Those prompts', a row each."""
        found = {name: t.to(self._device) for name, t in self._rows[[int(i) for i in numbers]].items()}
        if self._time_ids is not None:
            found["time_ids"] = self._time_ids.expand(len(numbers), 6)
        return TextConditioning.of(found)

    @property
    def unconditional(self) -> TextConditioning:
        """One row."""
        return self.at([len(self)])


def _rules_of(tokenizer: Any) -> str:
    """A hash of what makes token numbers of a text, in this version of its library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = None if backend is None else backend.to_str()
    return key_of([type(tokenizer).__name__, rules, tokenizer.model_max_length, tokenizer.pad_token_id])


def vae_facts(parts: Parts) -> dict[str, str]:
    """What makes latents of pixels."""
    return {"vae": network_hash(parts.vae), "scale": repr(parts.scale)}


def latents_key(images: ImageTextFolder, parts: Parts, resolution: int) -> str:
    """A hash of the images' names and sizes, and of all that makes their latents."""
    return key_of({**vae_facts(parts), "resolution": resolution, "files": images.fingerprint()})


def write_latents(
    root: Path,
    images: ImageTextFolder,
    parts: Parts,
    resolution: int,
    device: torch.device,
    done: Callable[[int], None],
) -> Rows:
    """The latents of real images, the mean of the VAE's encoder, made where they are not there yet."""
    folder = root / f"latents-{latents_key(images, parts, resolution)[:32]}"
    vae, scale = parts.vae, parts.scale

    @torch.no_grad()
    def make(start: int, stop: int) -> Made:
        vae.to(device)
        found = []
        for first in range(start, stop, _ENCODED):
            pixels = np.stack([images.image(i, resolution) for i in range(first, min(stop, first + _ENCODED))])
            x = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
            found.append(scale.from_vae(vae.encode(x).latent_dist.mode()).float().cpu())
        return {"latents": torch.cat(found)}

    write_rows(folder, len(images), make, device, _LATENT_SHARD, done)
    vae.to("cpu")
    return Rows(folder)


@dataclass(frozen=True)
class Share:
    """One process's share of what an iteration reads, on its device.

    Args:
        fake_texts: embeddings of the fake score's updates, one each.
        student_text: of the student's.
        latents, real_text: real latents and their captions' embeddings, or None.
    """

    fake_texts: tuple[TextConditioning, ...]
    student_text: TextConditioning
    latents: Tensor | None = None
    real_text: TextConditioning | None = None


class Inputs:
    """Shares of one process, as a function of the iteration's number.

    Args:
        settings: of the run.
        text: of the prompts.
        latents, captions: of real images, or None.
        device: where they go.
        rank, world: this process and their number.
    """

    def __init__(
        self,
        settings: TextToImageSettings,
        text: Text,
        latents: Rows | None,
        captions: Text | None,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        s = self.settings = settings
        self.text, self.latents, self.captions, self.device = text, latents, captions, device
        self.part = slice(rank * s.batch // world, (rank + 1) * s.batch // world)

    def at(self, iteration: int) -> Share:
        """Fresh prompts for every update of an iteration, and a batch of real latents."""
        s = self.settings
        updates = s.fake_updates + 1
        seed = seed_of(s.seed, _ORDER_OF_PROMPTS)
        texts = [
            self.text.at(indices_at((iteration * updates + i) * s.batch, s.batch, len(self.text), seed)[self.part])
            for i in range(updates)
        ]
        if self.latents is None or self.captions is None:
            return Share(tuple(texts[:-1]), texts[-1])
        order = indices_at(iteration * s.batch, s.batch, len(self.latents), seed_of(s.seed, _ORDER_OF_IMAGES))[
            self.part
        ]
        latents = self.latents[list(order)]["latents"].to(self.device, memory_format=torch.channels_last)
        return Share(tuple(texts[:-1]), texts[-1], latents, self.captions.at(order))

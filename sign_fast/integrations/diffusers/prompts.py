"""Prompts to embeddings, as Stable Diffusion 1, 2 and SDXL take them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import SignFastError, first_line, short, whole_number
from ...sampling.text import TextConditioning
from .parts import pixels_of, sides_of

_CHECKED = 1024  # prompts that are counted at a time


class PromptEncoder:
    """A pipeline's tokenizers and text encoders.

    With one text encoder the embedding is its last hidden state; with two (SDXL) the penultimate hidden states of both
    side by side, the pooled embedding of the second and the sizes that the network is told.

    Args:
        pipeline: a pipeline of diffusers, `loading.Parts`, or parts by name: tokenizer and text_encoder, tokenizer_2
            and text_encoder_2, unet and vae for SDXL's size where `encode` is given none.

    Raises:
        SignFastError: no text encoder, or one without its tokenizer.
    """

    def __init__(self, pipeline: Any) -> None:
        def part(name: str) -> Any:
            return pipeline.get(name) if isinstance(pipeline, Mapping) else getattr(pipeline, name, None)

        found = [(part(f"tokenizer{suffix}"), part(f"text_encoder{suffix}")) for suffix in ("", "_2")]
        self._pairs = [pair for pair in found if pair != (None, None)]
        if not self._pairs or any(None in pair for pair in self._pairs):
            raise SignFastError("prompts need a tokenizer and a text encoder: the pipeline lacks one")
        for tokenizer, encoder in self._pairs:
            words = encoder.get_input_embeddings().num_embeddings
            if len(tokenizer) > words:
                raise SignFastError(
                    f"the tokenizer has {len(tokenizer)} words, its text encoder {words}: they do not belong together"
                )
        self._default_size: tuple[int, int] | None = None
        if (unet := part("unet")) is not None and (vae := part("vae")) is not None:
            height, width = sides_of(unet)
            self._default_size = height * pixels_of(vae), width * pixels_of(vae)
        config = getattr(pipeline, "settings", None) or getattr(pipeline, "config", None) or {}
        self._zeros = bool(config.get("force_zeros_for_empty_prompt", False)) if isinstance(config, Mapping) else False

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that are read, the marks of its begin and end included; 77 for CLIP."""
        return min(_length(*pair) for pair in self._pairs)

    def check(self, prompts: Sequence[str], *, strict: bool = False) -> list[str]:
        """The prompts as a list.

        Longer ones than `max_tokens` will be cut, as diffusers does: one warning names the first.

        Args:
            prompts: one at least; "" is the unconditional one.
            strict: refuse prompts that are too long.

        Raises:
            SignFastError: no prompts, something that is no text, or, if strict, one that is too long.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise SignFastError(f"prompts must be a list of texts, not {short(prompts)}")
        if not prompts:
            raise SignFastError("no prompts: give at least one")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise SignFastError(f"prompt {short(prompt)} is no text")
        texts = list(prompts)
        longest = [0] * len(texts)
        limit = self.max_tokens
        for tokenizer, _ in self._pairs:
            counts = _lengths(tokenizer, texts)
            longest = [max(pair) for pair in zip(longest, counts, strict=True)]
        cut = [i for i, count in enumerate(longest) if count > limit]
        if cut:
            others = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
            said = f"prompt {short(texts[cut[0]])}{others} has {longest[cut[0]]} tokens, of which {limit} are read"
            if strict:
                raise SignFastError(f"{said}: shorten it")
            warnings.warn(f"{said}: its end is cut off", UserWarning, stacklevel=3)
        return texts

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        size: int | tuple[int, int] | None = None,
        chunk: int = 32,
        strict: bool = False,
    ) -> TextConditioning:
        """The embeddings of prompts, on the text encoder's device and in its dtype.

        Args:
            prompts, strict: as in `check`.
            size: (height, width) of the images in pixels, or both as one number, that SDXL is told; None means those
                that the network was trained with.
            chunk: prompts that are encoded at a time.

        Returns:
            states (B, T, D); with two encoders also pooled (B, P) and time_ids (B, 6) float32.

        Raises:
            SignFastError: as `check`; no size is known; or chunk < 1.
        """
        if whole_number(chunk, "chunk") < 1:
            raise SignFastError(f"chunk must be at least 1, not {chunk}")
        texts = self.check(prompts, strict=strict)
        times = self._time_ids(size)
        encoded = [self._encode(texts[i : i + chunk]) for i in range(0, len(texts), chunk)]
        states = torch.cat([states for states, _ in encoded])
        if times is None:
            return TextConditioning(states)
        pooled = torch.cat([pooled for _, pooled in encoded if pooled is not None])
        return TextConditioning(states, pooled, times.to(states.device).expand(len(texts), 6))

    def unconditional(self, size: int | tuple[int, int] | None = None) -> TextConditioning:
        """One row, of the prompt "": zeros where the pipeline says force_zeros_for_empty_prompt, as SDXL's does."""
        text = self.encode([""], size=size)
        if not self._zeros or text.pooled is None:
            return text
        return TextConditioning(torch.zeros_like(text.states), torch.zeros_like(text.pooled), text.time_ids)

    def _time_ids(self, size: int | tuple[int, int] | None) -> Tensor | None:
        """(1, 6): original height and width, crop at 0, 0, target height and width; None of one text encoder."""
        if len(self._pairs) == 1:
            return None
        size = self._default_size if size is None else size
        if size is None:
            raise SignFastError("SDXL is told the images' size: give size")
        height, width = (size, size) if isinstance(size, int) else size
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """(states, pooled or None) of a chunk."""
        states, pooled = [], None
        for tokenizer, encoder in self._pairs:
            ids = tokenizer(
                texts,
                padding="max_length",
                max_length=_length(tokenizer, encoder),
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(encoder.device)
            if len(self._pairs) == 1:
                return encoder(ids)[0], None
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        device = states[-1].device
        return torch.cat([s.to(device, states[-1].dtype) for s in states], dim=-1), pooled


def _length(tokenizer: Any, encoder: Any) -> int:
    """Tokens that both can take; a tokenizer that does not say gives an enormous number."""
    return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text. In parts: what a tokenizer returns takes kilobytes a text."""
    parts = (texts[i : i + _CHECKED] for i in range(0, len(texts), _CHECKED))
    try:
        return [len(x) for p in parts for x in tokenizer(p, truncation=False, padding=False, verbose=False).input_ids]
    except Exception as error:  # e.g. a lone surrogate, which is no text
        raise SignFastError(f"prompts cannot be read as text ({first_line(error)}): write them in UTF-8") from error

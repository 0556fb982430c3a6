"""`sign-fast generate` for a text-to-image pipeline's folder: an image a seed, of one prompt or of one each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import SignFastError

MODEL_INDEX = "model_index.json"


def is_pipeline(network: str) -> bool:
    """Whether the folder is a pipeline's in diffusers' layout."""
    return (Path(network) / MODEL_INDEX).is_file()


def read_texts(prompt: str | None, prompts: Path | None, num: int | None) -> list[str]:
    """The prompts that the options name: one, or those of a file, of which NUM are taken.

    Raises:
        SignFastError: neither or both options, a blank prompt, or a file without prompts.
    """
    from ..data.prompts import read_prompts

    if prompt is not None and prompts is not None:
        raise SignFastError("--prompt and --prompts are one choice: give one of them")
    if prompts is not None:
        return read_prompts(prompts)[:num]
    if prompt is None:
        raise SignFastError("a text-to-image pipeline needs --prompt TEXT or --prompts FILE")
    if not prompt.strip():
        raise SignFastError("--prompt is blank: give a text")
    return [prompt]


class TextGenerator:
    """What `generate` asks of an `ImageGenerator`, by a `SiDPipeline`.

    Args:
        network: its folder.
        device, dtype: where and in what it runs.
        seeds: of all images.
        texts: one for all of them, or one each.
        steps: None for the pipeline's own.

    Attributes:
        steps: of all images.
        text_of: the prompt by seed.

    Raises:
        SignFastError: the folder is damaged or not supported, or the numbers of seeds and prompts differ.
    """

    def __init__(
        self, network: str, device: Any, dtype: Any, seeds: Sequence[int], texts: Sequence[str], steps: int | None
    ) -> None:
        from ..checkpoints.store import resolve_device
        from ..integrations.diffusers import SiDPipeline
        from ..integrations.diffusers.arguments import check_steps
        from ..integrations.diffusers.prompts import PromptEncoder

        if len(texts) not in (1, len(seeds)):
            raise SignFastError(f"{len(texts)} prompts for {len(seeds)} seeds: give one prompt, or one a seed")
        self.device = resolve_device(device)
        self._steps = None if steps is None else check_steps(steps)
        self._pipe = SiDPipeline.from_pretrained(network, torch_dtype=dtype).to(self.device)
        PromptEncoder(self._pipe).check(texts)
        self.steps = self._steps or self._pipe.config.num_inference_steps
        self.text_of = dict(zip(seeds, list(texts) * (len(seeds) if len(texts) == 1 else 1), strict=True))

    def stream(self, batches: Sequence[Sequence[int]]) -> Iterator[Any]:
        """(B, H, W, 3) uint8 arrays, one a batch of seeds."""
        import numpy as np

        for i, batch in enumerate(batches):
            with (
                warnings.catch_warnings()
            ):  # each is said once: of the prompts above, of the steps with the first batch
                for said in ("prompt .* of which", *(["this student was distilled"] if i else [])):
                    warnings.filterwarnings("ignore", said)
                images = self._pipe([self.text_of[seed] for seed in batch], self._steps, seeds=batch).images
            yield np.stack([np.asarray(image) for image in images])

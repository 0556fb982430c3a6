"""Tiny `SiDPipeline`s and what they generate."""

from __future__ import annotations

import json
import warnings

import pytest

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers import SiDPipeline
from sign_fast.sampling.graphs import Graphs
from sign_fast.sampling.latent_engine import LatentEngine
from tests.integrations.diffusers import tiny
from tests.stand_in_capture import TapeStandIn

PROMPTS = ["a cat on the red dog", ""]


def fresh(kind, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tiny teacher is no student
        return SiDPipeline.from_pretrained(tiny.folder(kind), **options)


def floats(pipe, prompt=PROMPTS, **options):
    return pipe(prompt, output_type="np", **options).images


def latents_of(pipe, prompt=PROMPTS, **options):
    return pipe(prompt, output_type="latent", **options).images


class Captured(LatentEngine):
    _is_captured = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._graphs = Graphs("cpu", capture=TapeStandIn)


def edit(path, **changes):
    """Change entries of a JSON file; those that become ... are removed."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def refused(folder, message, **options):
    with pytest.raises(SignFastError, match=message) as caught:
        SiDPipeline.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)


def shown(pipe):
    return pipe("a cat", num_inference_steps=2, seeds=1, output_type="np").images

"""Tiny `SiDPipeline`s and what they generate."""

from __future__ import annotations

import warnings

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

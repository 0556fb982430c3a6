"""Samplers, schedules and seeds: teachers in many steps, students in one to four."""

from .ablation import ablation_sampler
from .edm import edm_sampler
from .generator import ImageGenerator
from .noise import SeededNoise, parse_seeds
from .students import few_step, few_step_latent, multistep, one_step, recursive

__all__ = [
    "ImageGenerator",
    "SeededNoise",
    "ablation_sampler",
    "edm_sampler",
    "few_step",
    "few_step_latent",
    "multistep",
    "one_step",
    "parse_seeds",
    "recursive",
]

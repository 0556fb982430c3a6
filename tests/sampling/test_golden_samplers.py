"""The published samplers' images from the published draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sign_fast import functional
from sign_fast.sampling import SeededNoise, ablation_sampler, edm_sampler, few_step, few_step_latent, one_step
from tests.golden_rules import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    filled,
    golden_net,
    normal,
    relative_error,
    settings,
)

SEEDS = [0, 1, 2, 5, 10, 2**32 + 3]


def counted(first: int):
    """A randn_like whose i-th call returns N(first + i), i from 1."""
    numbers = itertools.count(first + 1)
    return lambda x: normal(next(numbers), *x.shape).to(x)


@pytest.fixture(scope="module")
def net():
    return golden_net("ddpmpp")


SAMPLERS = {
    "heun18": (edm_sampler, 600, {}),
    "heun5": (edm_sampler, 600, {"num_steps": 5}),
    "churn": (edm_sampler, 600, {"num_steps": 8, "S_churn": 4, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}),
    "ab_euler_vp": (
        ablation_sampler,
        700,
        {"num_steps": 6, "solver": "euler", "discretization": "vp", "schedule": "vp", "scaling": "vp"},
    ),
    "ab_heun_ve": (
        ablation_sampler,
        700,
        {"num_steps": 6, "solver": "heun", "discretization": "ve", "schedule": "ve", "scaling": "none"},
    ),
    "ab_iddpm": (
        ablation_sampler,
        700,
        {"num_steps": 6, "solver": "heun", "discretization": "iddpm", "schedule": "linear", "scaling": "none"},
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(net, name):
    sampler, first_seed, options = SAMPLERS[name]
    latents = normal(501, 2, 3, 16, 16)
    images = sampler(net, latents, randn_like=counted(first_seed), **options)
    assert images.dtype == torch.float64
    assert relative_error(images, arrays("networks")[f"sampler/{name}"]) <= OUTPUT_TOLERANCE


def test_ablation_sampler_is_the_edm_sampler_at_its_defaults(net):
    latents = normal(501, 2, 3, 16, 16)
    got = ablation_sampler(net, latents, num_steps=5)
    assert relative_error(got, arrays("networks")["sampler/heun5"]) <= OUTPUT_TOLERANCE


def test_seeded_draws_are_exact():
    noise = SeededNoise("cpu", SEEDS)
    latents = noise.randn([6, 3, 16, 16])
    assert np.array_equal(latents.numpy(), arrays("networks")["seeds/latents"])
    # labels are drawn after the latents from the same generators
    assert np.array_equal(noise.randint(1000, size=[6]).numpy(), arrays("networks")["seeds/randint"])


def test_seeds_name_images_whatever_the_batch_and_the_order():
    whole = SeededNoise("cpu", SEEDS).randn([6, 3, 4, 4])
    for order in ([5, 2, 0], [3]):
        part = SeededNoise("cpu", [SEEDS[i] for i in order]).randn([len(order), 3, 4, 4])
        assert torch.equal(part, whole[order])


def test_one_step_and_uint8(net):
    latents = SeededNoise("cpu", SEEDS).randn([6, 3, 16, 16])
    images = one_step(net, latents)
    want = arrays("networks")["onestep/images"]
    assert relative_error(images, want) <= OUTPUT_TOLERANCE
    got, bytes_want = functional.to_uint8(images).numpy(), arrays("networks")["onestep/uint8"]
    level = want.astype(np.float64).transpose(0, 2, 3, 1) * 127.5 + 128
    near_a_step = np.abs(level - np.rint(level)) < 1e-4
    assert np.array_equal(got[~near_a_step], bytes_want[~near_a_step])
    assert np.abs(got.astype(int) - bytes_want).max() <= 1


def test_few_step_with_one_step_is_one_step(net):
    latents = normal(1, 2, 3, 16, 16)
    assert torch.equal(few_step(net, latents, num_steps=1), one_step(net, latents))


def test_few_step_calls_and_levels():
    seen = []

    def denoiser(x, sigma, labels):
        seen.append(float(sigma))
        return x / 2

    few_step(denoiser, normal(1, 2, 1, 4, 4), num_steps=4)
    assert seen[0] == 2.5 and len(seen) == 4
    assert seen == sorted(seen, reverse=True) and seen[-1] > 0


@pytest.fixture(scope="module")
def latent_net():
    diffusers = pytest.importorskip("diffusers")
    info = settings("latent")
    unet = diffusers.UNet2DConditionModel(**info["unet"]).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(filled(info["weights"]["generator"], name, p))
    emb = normal(info["emb_seed"], 4, 8, 16)[:3]
    return lambda x, t: unet(x, t, encoder_hidden_states=emb).sample


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_step_latent(latent_net, steps):
    got = few_step_latent(latent_net, normal(21, 3, 4, 8, 8), counted(21), num_steps=steps)
    assert relative_error(got, arrays("latent")[f"gen/K{steps}"]) <= OUTPUT_TOLERANCE


def test_rectified_flow_recovers_a_straight_path():
    # with v = n − x₀ known exactly, every number of steps and every noise rule returns x₀
    target, latents = normal(1, 2, 1, 4, 4), normal(2, 2, 1, 4, 4)
    for noise in ("fixed", "ddim"):
        for steps in (1, 3):
            got = few_step_latent(
                lambda x, t: latents - target, latents, num_steps=steps, prediction="flow", noise=noise
            )
            assert relative_error(got, target) <= GRADIENT_TOLERANCE

"""The published losses through the run's own updates: five guidance settings, and gradient through one call of four."""

from __future__ import annotations

import pytest
import torch

from sign_fast.distill.draws import Stream
from sign_fast.distill.latent import Guidance
from sign_fast.distill.latent_predictions import FIRST_STEP, LAST_STEP, prediction_of
from sign_fast.distill.text_to_image.inputs import Share
from sign_fast.distill.text_to_image.iteration import LatentIteration
from sign_fast.distill.text_to_image.method import TextStep
from sign_fast.distill.text_to_image.networks import build_latent_networks
from sign_fast.distill.text_to_image.settings import GUIDANCE, TextToImageSettings
from sign_fast.integrations.diffusers.loading import load_parts
from sign_fast.sampling.text import TextConditioning
from tests.distill.text_cases import CPU, GivenDraws, perturb
from tests.golden_rules import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, arrays, fill, normal, relative_error, settings
from tests.integrations.diffusers import tiny

SHAPE = (4, 8, 8)
NAMES = [name for name in settings("latent")["lsg"] if name.startswith("lsg")]
STILL = 1e-30  # a learning rate that changes no weight


@pytest.fixture(scope="module")
def parts():
    """The pipeline whose UNet is the golden one's."""
    found = load_parts(tiny.folder("sd15"))
    for name, value in settings("latent")["unet"].items():
        own = found.unet.config[name]
        assert (list(own) if isinstance(value, list) else own) == value, name
    return found


def updates_of(parts, **changes):
    s = TextToImageSettings("sid-latent", "", prompts="p", batch=3, lr=STILL, **changes)
    fill(parts.unet, 11)
    networks = build_latent_networks(parts, s, CPU)
    perturb(networks.fake.unet, fill(tiny.unet("sd15"), 12))
    found = LatentIteration(s, networks, prediction_of("epsilon"), SHAPE, s.student_scale_for("epsilon"), CPU)
    info = settings("latent")
    found.method.unconditional = TextConditioning(normal(info["uncond_seed"], 1, 8, 16))
    return found, TextConditioning(normal(info["emb_seed"], 4, 8, 16)[:3])


def uniforms(steps):
    """Draws that `training_times` makes the steps of."""
    return (torch.tensor(steps) - FIRST_STEP + 0.5) / (LAST_STEP - FIRST_STEP + 1)


def given_draws(keep=(0.9, 0.9, 0.9)):
    """The published draws; a prompt is dropped where `keep` is below 0.1."""
    draws = settings("latent")["lsg_draws"]
    normals = {
        Stream.FAKE_LATENT: draws["z_fake"],
        Stream.FAKE_NOISE: draws["noise_fake"],
        Stream.STUDENT_LATENT: draws["z_gen"],
        Stream.STUDENT_NOISE: draws["noise_gen"],
    }
    keep = torch.tensor(keep)
    return GivenDraws(
        {stream: normal(seed, 3, *SHAPE) for stream, seed in normals.items()},
        {
            Stream.FAKE_LEVEL: uniforms(draws["t_fake"]),
            Stream.STUDENT_LEVEL: uniforms(draws["t_gen"]),
            Stream.FAKE_PROMPT: keep,
            Stream.STUDENT_PROMPT: keep,
        },
    )


def guidance_of(name):
    """The settings with the scales in a golden name, and α."""
    kappas, alpha = name.removeprefix("lsg/k").split("_a")
    scales = Guidance(*map(float, kappas.split("_")))
    for strategy in GUIDANCE:
        scale = scales.fake if strategy == "anti-cfg" and scales.fake < 0 else None
        if strategy == "anti-cfg" and scale is None:
            continue
        s = TextToImageSettings("sid-latent", "", guidance=strategy, guidance_scale=scale)
        if s.scales == scales:
            return {"guidance": strategy, "guidance_scale": scale, "alpha": float(alpha)}
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_an_iteration(parts, name, monkeypatch):
    updates, text = updates_of(parts, **guidance_of(name))
    monkeypatch.setattr(updates, "_draws", lambda number: given_draws())
    found, want = updates.run(0, Share((text,), text)), settings("latent")["lsg"][name]
    assert relative_error(found["loss_fake"], want["loss_fake"]) <= OUTPUT_TOLERANCE
    assert relative_error(found["grad_norm_fake"], want["gnorm_fake"]) <= GRADIENT_TOLERANCE
    assert relative_error(found["loss_student"], want["loss_G"]) <= OUTPUT_TOLERANCE
    assert relative_error(found["grad_norm_student"], want["gnorm_G"]) <= GRADIENT_TOLERANCE


def test_every_strategy_but_anti_cfg_needs_no_scale_and_all_are_golden():
    assert {guidance_of(name)["guidance"] for name in NAMES} == set(GUIDANCE)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_gradient_through_one_call(parts, call):
    updates, text = updates_of(parts, steps=4)
    draws, want = settings("latent")["gen_draws"], settings("latent")["lsg"][f"fewstep/K4_k{call}"]
    normals = {Stream.STUDENT_LATENT: normal(draws["z"], 3, *SHAPE)}
    normals |= {Stream.STUDENT_RENOISE + i: normal(s, 3, *SHAPE) for i, s in enumerate(draws["renoise"], 1)}
    streams = (Stream.STUDENT_LATENT, Stream.STUDENT_RENOISE)
    updates.student.begin()
    got = updates.method.latents(updates.student, GivenDraws(normals, {}), streams, text, call)
    got.square().sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in updates.student.weights])
    assert relative_error(got, arrays("latent")[f"fewstep/K4_k{call}"]) <= OUTPUT_TOLERANCE
    assert relative_error(norm, want["gnorm"]) <= GRADIENT_TOLERANCE


def test_the_adversarial_term_adds_what_the_formula_says(parts, monkeypatch):
    """½·loss + ½·lsg_gan·BCE for the student, ½(BCE + BCE) beside the fake score's, of the middle block's mean."""
    changes = {"data": "d", "adversarial_weight": 3.0}
    updates, text = updates_of(parts, **changes, **guidance_of("lsg/k1_1_1_a1.0"))
    monkeypatch.setattr(updates, "_draws", lambda number: given_draws())
    real = normal(77, 3, *SHAPE)
    seen = []
    fake = updates.networks.fake
    hook = fake.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    found, want = updates.run(0, Share((text,), text, real, text)), settings("latent")["lsg"]["lsg/k1_1_1_a1.0"]
    hook.remove()
    assert relative_error(found["loss_fake"], want["loss_fake"]) <= OUTPUT_TOLERANCE
    assert relative_error(found["loss_student"], 0.5 * want["loss_G"]) <= OUTPUT_TOLERANCE
    of_fake, of_real, of_student = (h.mean(1, keepdim=True) for h in seen)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    discriminator = 0.5 * (bce(of_real, torch.ones_like(of_real)) + bce(of_fake, torch.zeros_like(of_fake)))
    assert relative_error(found["loss_discriminator"], discriminator) <= OUTPUT_TOLERANCE
    adversarial = 0.5 * 3.0 * bce(of_student.clamp(-10, 10), torch.ones_like(of_student))
    assert relative_error(found["loss_adversarial"], adversarial) <= OUTPUT_TOLERANCE
    # the real latents go through the network at the fake score's step and noise
    draws, p = settings("latent")["lsg_draws"], updates.method.prediction
    t = torch.tensor(draws["t_fake"])
    noised = p.noised(real, normal(draws["noise_fake"], 3, *SHAPE), t)
    with torch.no_grad():
        logits = fake(noised, t, text, features="only")
        both = fake(noised, t, text, features="also")
    assert relative_error(logits, of_real) <= OUTPUT_TOLERANCE and torch.equal(both[1], logits)
    assert torch.equal(both[0], fake(noised, t, text)) and not fake.unet.mid_block._forward_hooks


@pytest.mark.parametrize(("guidance", "empty"), [("lsg", [0]), ("zero-cfg", [0, 1, 2]), ("none", [])])
def test_real_latents_lose_the_same_prompts(parts, guidance, empty, monkeypatch):
    """Where the student's do: else an empty prompt would tell the discriminator who made the latents."""
    updates, text = updates_of(parts, data="d", guidance=guidance)
    fake, given = updates.networks.fake, {}
    forward = fake.forward

    def watched(x, t, seen, features=None):
        given[features] = seen.states[-len(text) :]  # of a guided call the rows with the prompts
        return forward(x, t, seen, features)

    monkeypatch.setattr(fake, "forward", watched)
    step = TextStep(given_draws((0.05, 0.9, 0.9)), images=normal(77, 3, *SHAPE), fake_texts=(text,), real_text=text)
    updates.method.fake_losses(updates.fake, step)
    nothing = updates.method.unconditional.states[0]
    for states in (given["also"], given["only"]):  # the student's, the real ones'
        assert [i for i, row in enumerate(states) if torch.equal(row, nothing)] == empty

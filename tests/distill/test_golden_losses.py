"""The published losses: of SiD and SiDA from tensors with every gradient, of latent SiD with a small network."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional
from sign_fast.distill import latent
from sign_fast.distill.discriminator import discriminator_loss, generator_adversarial_loss
from tests.golden_rules import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, arrays, fill, normal, relative_error, settings

SHAPE = (5, 3, 8, 8)
EACH_NAN = pytest.mark.parametrize("nan", [0, 1])


def leaf(seed, shape=SHAPE):
    return normal(seed, *shape).requires_grad_()


def check_gradients(name, golden, **leaves):
    for key, tensor in leaves.items():
        assert relative_error(tensor.grad, golden[f"{name}/grad_{key}"]) <= GRADIENT_TOLERANCE, key


@EACH_NAN
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_generator_loss(alpha, nan):
    name, golden = f"sid_gen/alpha{alpha}/nan{nan}", arrays("sid")
    images, y_real, y_fake = leaf(1), leaf(2), leaf(3)
    if nan:
        with torch.no_grad():
            y_real[2, 0, 3, 3] = float("nan")
    losses = functional.sid_generator_loss(images, y_real, y_fake, alpha)
    losses.sum().backward()
    assert relative_error(losses.double().sum(), golden[f"{name}/sum"]) <= OUTPUT_TOLERANCE
    check_gradients(name, golden, images=images, y_real=y_real, y_fake=y_fake)
    if nan:
        assert losses[2] == 0 and not any(t.grad[2].any() for t in (images, y_real, y_fake))


@EACH_NAN
def test_fake_score_loss(nan):
    name, golden = f"sid_fake/nan{nan}", arrays("sid")
    images, y_fake = normal(1, *SHAPE), leaf(4)
    if nan:
        with torch.no_grad():
            y_fake[1, 1, 2, 2] = float("nan")
    losses = functional.fake_score_loss(y_fake, images, torch.from_numpy(golden[f"{name}/sigma"]))
    losses.sum().backward()
    assert relative_error(losses.double().sum(), golden[f"{name}/sum"]) <= OUTPUT_TOLERANCE
    check_gradients(name, golden, y_fake=y_fake)
    if nan:
        assert losses[1] == 0 and not y_fake.grad[1].any()


def test_sida_fake_step():
    golden, seeds = arrays("sida"), settings("sida")["seeds"]["fake"]
    logit_shape = settings("sida")["logit_shape"]
    images, y_fake = normal(seeds["images"], *SHAPE), leaf(seeds["y_fake"])
    logit_fake, logit_real = leaf(seeds["logit_fake"], logit_shape), leaf(seeds["logit_real"], logit_shape)
    sigma = torch.from_numpy(golden["sida_fake/sigma"])
    loss_fake = functional.fake_score_loss(y_fake, images, sigma).sum() / 5
    loss_D = discriminator_loss(logit_real, logit_fake, sigma).sum() / 5
    (loss_fake + loss_D).backward()
    assert relative_error(loss_fake, golden["sida_fake/loss_fake"]) <= OUTPUT_TOLERANCE
    assert relative_error(loss_D, golden["sida_fake/loss_D"]) <= OUTPUT_TOLERANCE
    check_gradients("sida_fake", golden, y_fake=y_fake, logit_fake=logit_fake, logit_real=logit_real)


def test_sida_generator_step():
    golden, seeds = arrays("sida"), settings("sida")["seeds"]["gen"]
    images, y_real, y_fake = (leaf(seeds[name]) for name in ("images", "y_real", "y_fake"))
    logit = leaf(seeds["logit"], settings("sida")["logit_shape"])
    with torch.no_grad():
        logit[0, 0, 0, 0] = 12.0
    loss_sid = functional.sid_generator_loss(images, y_real, y_fake, alpha=1.0).sum() * 100 / 5
    loss_gan = generator_adversarial_loss(logit, images, y_real).sum() * 0.01 / 5
    (0.5 * loss_sid + 0.5 * loss_gan).backward()
    assert relative_error(loss_sid, golden["sida_gen/loss_sid"]) <= OUTPUT_TOLERANCE
    assert relative_error(loss_gan, golden["sida_gen/loss_gan"]) <= OUTPUT_TOLERANCE
    check_gradients("sida_gen", golden, images=images, y_real=y_real, y_fake=y_fake, logit=logit)
    assert logit.grad[0, 0, 0, 0] == 0


def unet(seed):
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DConditionModel(**settings("latent")["unet"]).eval()
    return fill(net, seed)


def callable_of(net):
    return lambda x, t, embeddings: net(x, t, encoder_hidden_states=embeddings).sample


@pytest.fixture(scope="module")
def latent_networks():
    """Teacher, student and the perturbed fake score of the published run."""
    weights = settings("latent")["weights"]
    teacher, student, fake, other = (unet(seed) for seed in (weights["teacher"], weights["generator"], 11, 12))
    with torch.no_grad():
        for p, q in zip(fake.parameters(), other.parameters(), strict=True):
            p.add_(0.02 * q)
    teacher.requires_grad_(False)
    return teacher, student, fake


@pytest.fixture(scope="module")
def prompts():
    info = settings("latent")
    return normal(info["emb_seed"], 4, 8, 16)[:3], normal(info["uncond_seed"], 1, 8, 16)


def gradient_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


def test_schedule():
    prediction, bars = latent.EpsilonPrediction(), torch.from_numpy(arrays("latent")["abar"])
    assert torch.equal(prediction.signal, bars.sqrt()) and torch.equal(prediction.spread, (1 - bars).sqrt())


@pytest.mark.parametrize("name", [name for name in settings("latent")["lsg"] if name.startswith("lsg")])
def test_latent_losses(latent_networks, prompts, name):
    teacher, student, fake = latent_networks
    embeddings, unconditional = prompts
    golden, want, draws = arrays("latent"), settings("latent")["lsg"][name], settings("latent")["lsg_draws"]
    kappas, alpha = name.removeprefix("lsg/k").split("_a")
    scales = latent.Guidance(*map(float, kappas.split("_")))
    prediction, shape = latent.EpsilonPrediction(), (3, 4, 8, 8)

    def images(seed):
        return latent.roll_out(callable_of(student), normal(seed, *shape), [], embeddings, prediction, 1, 1)

    given = (embeddings, unconditional, prediction, scales)
    with torch.no_grad():
        data = images(draws["z_fake"])
    fake.requires_grad_(True).zero_grad()
    t, noise = torch.tensor(draws["t_fake"]), normal(draws["noise_fake"], *shape)
    loss_fake = latent.fake_score_loss(callable_of(fake), data, noise, t, *given).sum() / 3
    loss_fake.backward()
    assert relative_error(loss_fake, want["loss_fake"]) <= OUTPUT_TOLERANCE
    assert relative_error(gradient_norm(fake), want["gnorm_fake"]) <= GRADIENT_TOLERANCE

    fake.requires_grad_(False)
    student.zero_grad()
    t, noise = torch.tensor(draws["t_gen"]), normal(draws["noise_gen"], *shape)
    losses, y_real, y_fake = latent.student_loss(
        callable_of(teacher), callable_of(fake), images(draws["z_gen"]), noise, t, *given, float(alpha)
    )
    (losses.sum() / 3).backward()
    assert relative_error(y_fake, golden[f"{name}/y_fake"]) <= OUTPUT_TOLERANCE
    assert relative_error(y_real, golden[f"{name}/y_real"]) <= OUTPUT_TOLERANCE
    assert relative_error(losses.sum() / 3, want["loss_G"]) <= OUTPUT_TOLERANCE
    assert relative_error(gradient_norm(student), want["gnorm_G"]) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_few_step_gradient_through_one_call(latent_networks, prompts, call):
    student, draws = latent_networks[1], settings("latent")["gen_draws"]
    want = settings("latent")["lsg"][f"fewstep/K4_k{call}"]
    latents, *noises = (normal(seed, 3, 4, 8, 8) for seed in (draws["z"], *draws["renoise"]))
    student.zero_grad()
    got = latent.roll_out(callable_of(student), latents, noises, prompts[0], latent.EpsilonPrediction(), call, 4)
    got.square().sum().backward()
    assert relative_error(got, arrays("latent")[f"fewstep/K4_k{call}"]) <= OUTPUT_TOLERANCE
    assert relative_error(got.norm(), want["norm"]) <= OUTPUT_TOLERANCE
    assert relative_error(gradient_norm(student), want["gnorm"]) <= GRADIENT_TOLERANCE

"""What the latent losses promise beyond the golden numbers: calls, graphs, weights, NaN samples, equal forms."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from sign_fast import functional
from sign_fast.distill import latent
from sign_fast.distill.discriminator import pooled_logits
from sign_fast.sampling import few_step_latent
from sign_fast.sampling.text import TextConditioning
from tests.golden_rules import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, normal, relative_error

NAN = float("nan")
SHAPE = (4, 2, 4, 4)
EMBEDDINGS, UNCONDITIONAL = normal(11, 4, 3, 5), normal(12, 1, 3, 5)
EACH_PREDICTION = pytest.mark.parametrize(
    "prediction",
    [latent.EpsilonPrediction(), latent.VelocityPrediction(), latent.FlowPrediction()],
    ids=["epsilon", "v", "flow"],
)


class Network(torch.nn.Module):
    """A network small enough to differentiate by hand that reads every input; counts its calls and their rows."""

    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * normal(seed, 2, 2))
        self.calls = []

    def forward(self, x, t, embeddings):
        self.calls.append((x.shape[0], torch.is_grad_enabled()))
        mixed = torch.einsum("oc,bchw->bohw", self.weight, x)
        shift = embeddings.mean((1, 2)) + t.float() / (1 + t.abs().max())
        return torch.tanh(mixed + shift[:, None, None, None])


def times(prediction):
    if isinstance(prediction, latent.EpsilonPrediction):
        return prediction.training_times(torch.tensor([0.0, 0.3, 0.6, 1 - 2**-24]))
    return prediction.training_times(torch.tensor([-2.0, -0.3, 0.6, 1.5]))


@pytest.mark.parametrize(
    "scale, rows, given", [(1, 4, EMBEDDINGS), (0, 4, UNCONDITIONAL.expand(4, 3, 5)), (3, 8, None), (-0.5, 8, None)]
)
def test_guidance_calls(scale, rows, given):
    net, x, t = Network(1), normal(2, *SHAPE), torch.tensor([20, 300, 600, 979])
    got = latent.guided(net, x, t, EMBEDDINGS, UNCONDITIONAL, scale)
    assert [call[0] for call in net.calls] == [rows]
    c, u = net(x, t, EMBEDDINGS), net(x, t, UNCONDITIONAL.expand(4, 3, 5))
    assert relative_error(got, u + scale * (c - u)) <= OUTPUT_TOLERANCE
    if given is not None:
        assert torch.equal(got, net(x, t, given))


def test_a_scale_of_one_needs_no_unconditional_embedding_and_others_do():
    x, t = normal(2, *SHAPE), torch.full([4], 500)
    latent.guided(Network(1), x, t, EMBEDDINGS, None, 1)
    with pytest.raises(ValueError, match="needs the unconditional embedding"):
        latent.guided(Network(1), x, t, EMBEDDINGS, None, 2)


def test_strategies():
    scales = {name: latent.guidance(name) for name in latent.STRATEGIES}
    assert scales["lsg"] == latent.Guidance(2, 2, 2) and scales["lsg-4.5"] == latent.Guidance(1.5, 1.5, 4.5)
    assert scales["zero-cfg"] == latent.Guidance(0, 0, 1) and scales["none"] == latent.Guidance(1, 1, 1)
    assert latent.guidance("anti-cfg", -0.5) == latent.Guidance(-0.5, -0.5, 1)
    assert {name: g.prompt_dropout for name, g in scales.items()} == {
        "none": 0.0,
        "lsg": 0.1,
        "lsg-4.5": 0.1,
        "zero-cfg": 0.1,
    }
    for bad in [("anti-cfg", None), ("anti-cfg", 0.5), ("anti-cfg", -math.inf), ("lsg", 2.0), ("cfg", None)]:
        with pytest.raises(ValueError, match=r"negative scale|fixed|must be one of none, lsg"):
            latent.guidance(*bad)


def test_dropped_prompts():
    got = latent.drop_prompts(EMBEDDINGS, UNCONDITIONAL, torch.tensor([0.05, 0.5, 0.0999, 0.1]), 0.1)
    assert torch.equal(got[[0, 2]], UNCONDITIONAL.expand(2, 3, 5)) and torch.equal(got[[1, 3]], EMBEDDINGS[[1, 3]])


def test_training_times():
    uniform = (torch.arange(960) + 0.5) / 960
    t = latent.EpsilonPrediction().training_times(uniform)
    assert t.dtype == torch.int64 and torch.equal(t, torch.arange(20, 980))
    assert latent.EpsilonPrediction().training_times(torch.tensor([0.0, 1 - 2**-24, 1.0])).tolist() == [20, 979, 979]
    flow = latent.FlowPrediction().training_times(torch.tensor([-1.0, 0.0, 2.0]))
    assert relative_error((flow / (1 - flow)).log(), math.log(2) + 1.6 * torch.tensor([-1.0, 0.0, 2.0])) <= 1e-5


@EACH_PREDICTION
def test_noising_and_its_inverses(prediction):
    images, noise, t = normal(1, *SHAPE).double(), normal(2, *SHAPE).double(), times(prediction)
    x = prediction.noised(images, noise, t)
    assert relative_error(prediction.denoised(x, prediction.target(images, noise, t), t), images) <= GRADIENT_TOLERANCE
    assert relative_error(prediction.implied_noise(x, images, t), noise) <= GRADIENT_TOLERANCE


@EACH_PREDICTION
@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_roll_out_is_the_sampler(prediction, noise, steps):
    net, latents = Network(3), normal(1, *SHAPE)
    noises = [normal(20 + i, *SHAPE) for i in range(steps - 1)]
    draws = iter(noises)
    names = {latent.EpsilonPrediction: "epsilon", latent.VelocityPrediction: "v", latent.FlowPrediction: "flow"}
    name = names[type(prediction)]
    want = few_step_latent(lambda x, t: net(x, t, EMBEDDINGS), latents, lambda x: next(draws), steps, name, noise)
    got = latent.roll_out(net, latents, noises, EMBEDDINGS, prediction, steps, steps, noise=noise)
    assert relative_error(got, want) <= OUTPUT_TOLERANCE


@EACH_PREDICTION
@pytest.mark.parametrize("call", [1, 2, 3])
def test_gradient_flows_through_the_last_call_only(prediction, call):
    net = Network(3)
    latents = normal(1, *SHAPE).requires_grad_()
    noises = [normal(20 + i, *SHAPE).requires_grad_() for i in range(3)]
    entered, left = [], []

    def watched(x, t, embeddings):
        entered.append(x)
        left.append(net(x, t, embeddings))
        return left[-1]

    got = latent.roll_out(watched, latents, noises, EMBEDDINGS, prediction, call, 4)
    assert [grad for _, grad in net.calls] == [False] * (call - 1) + [True]
    assert not any(x.requires_grad for x in entered) and [y.requires_grad for y in left][:-1] == [False] * (call - 1)
    (direct,) = torch.autograd.grad(got.square().sum(), net.weight, retain_graph=True)
    # the same from that call alone, its input given as a constant
    t = torch.full([4], prediction.grid(4)[call - 1], dtype=prediction.time_dtype)
    again = prediction.denoised(entered[-1], net(entered[-1], t, EMBEDDINGS), t)
    (alone,) = torch.autograd.grad(again.square().sum(), net.weight)
    assert torch.equal(direct, alone)
    found = torch.autograd.grad(got.sum(), [latents, *noises], allow_unused=True)
    assert all(g is None for g in found)


def test_nothing_of_the_roll_out_is_kept():
    """Outputs of the calls before the trained one are freed while D_k and its graph live."""
    net, alive = Network(3), []

    def watched(x, t, embeddings):
        out = net(x, t, embeddings)
        alive.append(weakref.ref(out))
        return out

    noises = [normal(20 + i, *SHAPE) for i in range(3)]
    got = latent.roll_out(watched, normal(1, *SHAPE), noises, EMBEDDINGS, latent.EpsilonPrediction(), 4, 4)
    gc.collect()
    assert got.requires_grad and [ref() is None for ref in alive[:3]] == [True] * 3


def losses_of(prediction, images, scales, alpha=1.2, weight=None, nets=None):
    teacher, fake = nets or (Network(5), Network(6))
    given = (normal(8, *SHAPE), times(prediction), EMBEDDINGS, UNCONDITIONAL, prediction, scales)
    loss_fake = latent.fake_score_loss(fake, images, *given)
    return loss_fake, *latent.student_loss(teacher, fake, images, *given, alpha, weight=weight)


@EACH_PREDICTION
def test_calls_and_rows_of_both_losses(prediction):
    for scales, fake, teacher in [
        (latent.guidance("none"), [4, 4], [4]),
        (latent.guidance("zero-cfg"), [4, 4], [4]),
        (latent.guidance("lsg-4.5"), [8, 8], [8]),
        (latent.guidance("anti-cfg", -1.0), [8, 8], [4]),
    ]:
        nets = Network(5), Network(6)
        losses_of(prediction, normal(7, *SHAPE), scales, nets=nets)
        assert [rows for rows, _ in nets[0].calls] == teacher and [rows for rows, _ in nets[1].calls] == fake


@EACH_PREDICTION
def test_the_published_form_for_alpha_one(prediction):
    """(y_r − y_f)(y_f − x_g)/ω, with gradients of all three."""
    images = normal(7, *SHAPE).requires_grad_()
    _, loss, y_real, y_fake = losses_of(prediction, images, latent.guidance("lsg"), alpha=1.0)
    omega = (images - y_real).detach().abs().mean((1, 2, 3))
    want = ((y_real - y_fake) * (y_fake - images)).sum((1, 2, 3)) / omega
    assert relative_error(loss, want) <= OUTPUT_TOLERANCE
    got, expected = (torch.autograd.grad(t.sum(), images, retain_graph=True)[0] for t in (loss, want))
    assert relative_error(got, expected) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("name", latent.FLOW_WEIGHTS)
def test_flow_weights_by_formula(name):
    prediction, images = latent.FlowPrediction(), normal(7, *SHAPE)
    t = times(prediction)
    _, loss, y_real, y_fake = losses_of(prediction, images, latent.guidance("none"), weight=latent.flow_weight(name, t))
    weights = {
        "1/omega": 1 / (images - y_real).abs().mean((1, 2, 3)),
        "1-t": 1 - t,
        "(1-t)/t": (1 - t) / t,
        "((1-t)/t)^2": ((1 - t) / t) ** 2,
    }
    gap = y_real - y_fake
    want = weights[name] * (gap * ((y_real - images) - 1.2 * gap)).sum((1, 2, 3))
    assert relative_error(loss, want) <= OUTPUT_TOLERANCE


def test_v_is_what_the_literature_says():
    """ε = √ᾱ·v + √(1−ᾱ)·x, and its loss is that of ε divided by ᾱ."""
    epsilon, v = latent.EpsilonPrediction(), latent.VelocityPrediction()
    images, noise, t = normal(7, *SHAPE).double(), normal(8, *SHAPE).double(), times(v)
    signal, spread = (a[t].reshape(-1, 1, 1, 1) for a in (v.signal, v.spread))
    x, target = v.noised(images, noise, t), v.target(images, noise, t)
    assert relative_error(signal * target + spread * x, noise) <= GRADIENT_TOLERANCE
    guess = normal(9, *SHAPE).double()
    as_noise = signal * guess + spread * x
    assert relative_error(v.denoised(x, guess, t), epsilon.denoised(x, as_noise, t)) <= GRADIENT_TOLERANCE
    errors = [(a - b).square().sum((1, 2, 3)) for a, b in ((guess, target), (as_noise, noise))]
    assert relative_error(errors[0] * signal.flatten() ** 2, errors[1]) <= GRADIENT_TOLERANCE


def test_schedules_of_other_betas():
    bars = [0.99 * (1 - i / 1000) for i in range(1000)]
    found = latent.prediction_of("v", bars=bars)
    assert torch.equal(found.signal, torch.tensor(bars).sqrt())
    assert isinstance(latent.prediction_of("flow"), latent.FlowPrediction)


def test_text_of_several_tensors_is_guided_and_dropped_row_by_row():
    text = TextConditioning(EMBEDDINGS, normal(13, 4, 6), torch.ones(1, 6).expand(4, 6))
    empty = TextConditioning(UNCONDITIONAL, normal(14, 1, 6), torch.ones(1, 6))
    seen = []

    def predict(x, t, given):
        seen.append(given)
        return x * given.pooled.mean(1).reshape(-1, 1, 1, 1)

    x, t = normal(2, *SHAPE), torch.full([4], 500)
    got = latent.guided(predict, x, t, text, empty, 3.0)
    assert len(seen[0]) == 8 and torch.equal(seen[0].pooled, torch.cat([empty.pooled.expand(4, 6), text.pooled]))
    c, u = (x * given.pooled.mean(1).reshape(-1, 1, 1, 1) for given in (text, empty))
    assert relative_error(got, u + 3 * (c - u)) <= OUTPUT_TOLERANCE
    assert relative_error(latent.guided(predict, x, t, text, empty, 0), u) <= OUTPUT_TOLERANCE
    dropped = latent.drop_prompts(text, empty, torch.tensor([0.05, 0.5, 0.0999, 0.1]), 0.1)
    assert torch.equal(dropped.pooled[[0, 2]], empty.pooled.expand(2, 6)) and torch.equal(
        dropped.states[[1, 3]], text.states[[1, 3]]
    )


def test_the_fake_score_of_a_flow_predicts_velocity():
    prediction, images, noise = latent.FlowPrediction(), normal(7, *SHAPE), normal(8, *SHAPE)
    loss = latent.fake_score_loss(
        lambda x, t, embeddings: noise - images + 0.5,
        images.clone().requires_grad_(),
        noise,
        times(prediction),
        EMBEDDINGS,
        None,
        prediction,
        latent.guidance("none"),
    )
    assert relative_error(loss, torch.full([4], 0.25 * 32)) <= OUTPUT_TOLERANCE and not loss.requires_grad


@EACH_PREDICTION
def test_a_nan_sample_counts_nothing(prediction):
    """Others' losses and gradients stay what they are without it: the divisor is the caller's B."""
    clean = normal(7, *SHAPE).requires_grad_()
    with torch.no_grad():
        broken = clean.clone()
        broken[1, 0, 2, 2] = NAN
    broken.requires_grad_()
    nets = Network(5), Network(6)
    results = []
    for images in (clean, broken):
        loss_fake, loss, *_ = losses_of(prediction, images, latent.guidance("lsg"), nets=nets)
        by_sample = [torch.autograd.grad(loss_fake[i], nets[1].weight, retain_graph=True)[0] for i in (0, 2, 3)]
        (whole,) = torch.autograd.grad(loss_fake.sum(), nets[1].weight)
        loss.sum().backward()
        results.append((loss_fake.detach(), loss.detach(), images.grad, sum(by_sample), whole))
    keep = [0, 2, 3]
    for a, b in zip(results[1][:3], results[0][:3], strict=True):
        assert not a[1].any() and torch.equal(a[keep], b[keep])
    assert torch.isfinite(results[1][4]).all()
    assert relative_error(results[1][4], results[0][3]) <= GRADIENT_TOLERANCE


def test_diffusion_gan():
    features = normal(1, 4, 6, 2, 2)
    logits = pooled_logits(features.bfloat16())
    assert logits.shape == (4, 1, 2, 2) and logits.dtype == torch.float32
    tokens = features.flatten(2).transpose(1, 2)
    assert torch.equal(pooled_logits(tokens, -1).flatten(), features.flatten(2).mean(1).flatten())
    real, fake = (4 * normal(seed, 4, 1, 2, 2) for seed in (2, 3))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    want = 0.5 * torch.stack(
        [bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f)) for r, f in zip(real, fake, strict=True)]
    )
    assert relative_error(latent.diffusion_gan_discriminator_loss(real, fake), want) <= OUTPUT_TOLERANCE
    fake[0, 0, 0, 0], fake[1, 0, 0, 0], fake[2, 0, 0, 0] = -20.0, 20.0, NAN
    fake.requires_grad_()
    loss = latent.diffusion_gan_student_loss(fake)
    loss.sum().backward()
    clamped = fake.detach().clamp(-10, 10)
    want = torch.stack([bce(f, torch.ones_like(f)) for f in clamped])
    want[2] = 0
    assert relative_error(loss, want) <= OUTPUT_TOLERANCE
    assert fake.grad[0, 0, 0, 0] == fake.grad[1, 0, 0, 0] == 0 and not fake.grad[2].any()
    assert fake.grad[3].all()


def test_fake_score_loss_with_a_weight_of_its_own():
    y, x, sigma = normal(1, *SHAPE), normal(2, *SHAPE), torch.tensor([0.1, 0.5, 1.0, 4.0])
    by_sigma = functional.fake_score_loss(y, x, sigma)
    assert torch.equal(functional.fake_score_loss(y, x, weight=sigma**-2 + 4), by_sigma)
    with pytest.raises(ValueError, match="sigma or weight is needed"):
        functional.fake_score_loss(y, x)
    with pytest.raises(ValueError, match="weight must hold 4 values, not 3"):
        functional.fake_score_loss(y, x, weight=torch.ones(3))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"call": 5}, "call must be one of 1 … 4, not 5"),
        ({"call": 0}, "call must be one of 1 … 4, not 0"),
        ({"call": 3}, "call 3 needs 2 noises, not 1"),
        ({"noise": "old"}, "noise must be fresh, fixed or ddim"),
    ],
)
def test_bad_roll_outs(changes, message):
    given = {"call": 2, "num_steps": 4, **changes}
    with pytest.raises(ValueError, match=message):
        latent.roll_out(
            Network(1), normal(1, *SHAPE), [normal(2, *SHAPE)], EMBEDDINGS, latent.EpsilonPrediction(), **given
        )


def test_unknown_flow_weight():
    with pytest.raises(ValueError, match="the weight must be one of 1/omega, 1-t"):
        latent.flow_weight("t", torch.ones(2))

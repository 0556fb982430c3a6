"""The plans of all samplers against plain transcriptions of the published algorithms, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sign_fast.sampling.ablation import ablation_plan, vp_schedule
from sign_fast.sampling.edm import edm_plan, karras_sigmas
from sign_fast.sampling.loop import run_plan
from sign_fast.sampling.plan import Call, Combine, Plan
from sign_fast.sampling.students import (
    alpha_bars,
    few_step_latent_plan,
    few_step_plan,
    few_step_sigmas,
    multistep_plan,
    one_step_plan,
    recursive_plan,
)
from tests.golden_rules import normal, relative_error

SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-12
LINEAR_BARS = tuple((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist())


def draws(count: int) -> list[torch.Tensor]:
    return [normal(40 + i, *SHAPE).double() for i in range(count)]


def denoised(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth denoiser that depends on both arguments."""
    return torch.tanh(x / (1 + sigma)) * 0.7 + x.roll(1, -1) / (2 + sigma**2) + 0.1 * math.sin(sigma)


def follow(plan: Plan) -> torch.Tensor:
    return run_plan(plan, lambda x, level: denoised(x, plan.levels[level]), draws(plan.draws))


def calls(plan: Plan) -> list[float]:
    return [plan.levels[step.level] for step in plan.steps if isinstance(step, Call)]


def edm_algorithm_2(num_steps, churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0, rounded=lambda s: s):
    """EDM, Algorithm 2, line by line; noise is drawn as the published program draws it, at every step or never."""
    noise = iter(draws(num_steps + 1))
    t = [rounded(float(s)) for s in karras_sigmas(num_steps, 0.002, 80, 7)] + [0.0]
    x = t[0] * next(noise)
    for i in range(num_steps):
        gamma = min(churn / num_steps, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0
        t_hat = rounded(t[i] + gamma * t[i])
        x_hat = x
        if churn > 0:
            x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * next(noise)
        d = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - denoised(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 18])
def test_heun(num_steps):
    plan = edm_plan(num_steps)
    assert relative_error(follow(plan), edm_algorithm_2(num_steps)) <= TOLERANCE
    assert len(calls(plan)) == 2 * num_steps - 1
    assert len(plan.levels) == num_steps and plan.draws == 1


@pytest.mark.parametrize("limits", [{}, {"s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}])
def test_churn(limits):
    options = {{"s_min": "S_min", "s_max": "S_max", "s_noise": "S_noise"}[k]: v for k, v in limits.items()}
    plan = edm_plan(8, S_churn=4, **options)
    assert plan.draws == 9
    assert relative_error(follow(plan), edm_algorithm_2(8, 4.0, **limits)) <= TOLERANCE


def test_rounded_noise_levels():
    def rounded(sigma):
        return float(torch.tensor(2.0 ** (round(4 * math.log2(sigma)) / 4)))  # float32, as iDDPM's levels are

    plan = edm_plan(6, S_churn=20, round_sigma=lambda t: torch.tensor([rounded(s) for s in t.tolist()]))
    assert calls(plan)[1::2] == [rounded(s) for s in karras_sigmas(6, 0.002, 80, 7).tolist()[1:]]
    assert relative_error(follow(plan), edm_algorithm_2(6, 20.0, rounded=rounded)) <= TOLERANCE


def test_the_networks_range_narrows_the_schedule():
    plan = edm_plan(4, net_sigma_min=0.1, net_sigma_max=50.0)
    assert calls(plan)[0] == pytest.approx(50) and calls(plan)[-1] == pytest.approx(0.1)


def test_refusals():
    with pytest.raises(ValueError, match="at least 1"):
        edm_plan(0)
    with pytest.raises(ValueError, match="must be positive"):
        edm_plan(4, sigma_min=0.0)
    for wrong in ("solver", "discretization", "schedule", "scaling"):
        with pytest.raises(ValueError, match=f"{wrong} must be one of"):
            ablation_plan(4, **{wrong: "other"})
    with pytest.raises(ValueError, match="prediction must be"):
        few_step_latent_plan(2, "score")
    with pytest.raises(ValueError, match="noise must be"):
        few_step_latent_plan(2, "flow", "none")
    with pytest.raises(ValueError, match="at least 1"):
        few_step_plan(0)


def general_algorithm_1(solver, schedule, scaling, alpha, churn, num_steps=6):
    """EDM, Algorithm 1 with the α of its appendix and churn, in scaled states, for sigmas of the "edm" rule."""
    low, high = math.log1p(0.002**2), math.log1p(80.0**2)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    vp = vp_schedule(beta_d, high - 0.5 * beta_d)
    sigma, rate, inverse = {
        "vp": (vp.sigma, vp.derivative, vp.inverse),
        "ve": (math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda s: s * s),
        "linear": (lambda t: t, lambda t: 1.0, lambda s: s),
    }[schedule]

    def s(t):
        return 1 / math.sqrt(1 + sigma(t) ** 2) if scaling == "vp" else 1.0

    def s_rate(t):
        return -sigma(t) * rate(t) * s(t) ** 3 if scaling == "vp" else 0.0

    def slope(x, t):
        scaled = rate(t) / sigma(t)
        return (scaled + s_rate(t) / s(t)) * x - scaled * s(t) * denoised(x / s(t), sigma(t))

    noise = iter(draws(num_steps + 1))
    t = [inverse(float(u)) for u in karras_sigmas(num_steps, 0.002, 80, 7)] + [0.0]
    x = sigma(t[0]) * s(t[0]) * next(noise)
    gamma = min(churn / num_steps, math.sqrt(2) - 1)
    for i in range(num_steps):
        t_hat = inverse(sigma(t[i]) * (1 + gamma))
        x_hat = s(t_hat) / s(t[i]) * x
        if churn > 0:
            x_hat = x_hat + math.sqrt(max(sigma(t_hat) ** 2 - sigma(t[i]) ** 2, 0)) * s(t_hat) * next(noise)
        h = t[i + 1] - t_hat
        d = slope(x_hat, t_hat)
        if solver == "euler" or i == num_steps - 1:
            x = x_hat + h * d
        else:
            d_prime = slope(x_hat + alpha * h * d, t_hat + alpha * h)
            x = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
    return x


CASES = list(itertools.product(["heun", "euler"], ["vp", "ve", "linear"], ["vp", "none"], [1.0, 0.5], [0.0, 3.0]))


@pytest.mark.parametrize("solver, schedule, scaling, alpha, churn", CASES)
def test_general_sampler(solver, schedule, scaling, alpha, churn):
    plan = ablation_plan(
        6, solver=solver, schedule=schedule, scaling=scaling, alpha=alpha, S_churn=churn, sigma_min=0.002, sigma_max=80
    )
    want = general_algorithm_1(solver, schedule, scaling, alpha, churn)
    assert relative_error(follow(plan), want) <= TOLERANCE


def test_one_and_few_steps():
    z = draws(4)
    assert torch.equal(follow(one_step_plan(3.0)), denoised(3.0 * z[0], 3.0))
    sigmas = few_step_sigmas(4, 3.0)
    d = torch.zeros(SHAPE, dtype=torch.float64)
    for n, sigma in zip(z, sigmas, strict=True):
        d = denoised(d + sigma * n, sigma)
    assert relative_error(follow(few_step_plan(4, 3.0)), d) <= TOLERANCE


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("bars", [None, LINEAR_BARS], ids=["published", "linear"])
def test_few_steps_of_latent_models(num_steps, prediction, noise, bars):
    z = draws(num_steps)
    d, n = torch.zeros(SHAPE, dtype=torch.float64), z[0]
    for i in range(num_steps):
        if prediction != "flow":
            t = 625 * (num_steps - i) // num_steps
            bar = (bars or alpha_bars())[t]
            a, s = bar**0.5, (1 - bar) ** 0.5
        else:
            t = 1 - i / num_steps
            a, s = 1 - t, t
        if i > 0 and noise == "fresh":
            n = z[i]
        x = a * d + s * n
        output = denoised(x, t)
        d = {"epsilon": (x - s * output) / a if a else x, "v": a * x - s * output, "flow": x - s * output}[prediction]
        if noise == "ddim":
            n = (x - a * d) / s
    plan = few_step_latent_plan(num_steps, prediction, noise, torch.float64, bars)
    assert plan.draws == (num_steps if noise == "fresh" else 1)
    assert relative_error(follow(plan), d) <= TOLERANCE


def test_schedules_of_latent_models():
    assert few_step_latent_plan(2, "v", bars=alpha_bars()).coefficients == few_step_latent_plan(2, "v").coefficients
    copied = tuple(float(str(bar)) for bar in LINEAR_BARS)
    assert few_step_latent_plan(2, "v", bars=LINEAR_BARS) is few_step_latent_plan(2, "v", bars=copied)
    for bad in (alpha_bars()[:-1], (0.0,) * 1000, (math.nan,) * 1000):
        with pytest.raises(ValueError, match="schedule must have 1000 numbers"):
            few_step_latent_plan(2, "epsilon", bars=bad)
    few_step_latent_plan(2, "flow", bars=())  # has a schedule of its own


def test_time_free_students():
    z = draws(3)
    assert torch.equal(follow(recursive_plan(2, torch.float64)), denoised(denoised(z[0], 0.0), 0.0))
    x = denoised(z[0], 0.0)
    x = denoised(0.25 * x + 0.75 * z[1], 0.0)
    x = denoised(z[2], 0.0)  # τ = 1 forgets x
    assert relative_error(follow(multistep_plan([0.75, 1.0], torch.float64)), x) <= TOLERANCE
    x = denoised(denoised(denoised(z[0], 0.0), 0.0) * 0.25 + 0.75 * z[2], 0.0)  # τ = 0 adds nothing
    assert relative_error(follow(multistep_plan([0.0, 0.75], torch.float64)), x) <= TOLERANCE


def test_plans_of_one_setting_are_one_object():
    # its C++ form is then made once
    assert edm_plan(7) is edm_plan(7) and few_step_plan(3) is few_step_plan(3)
    assert edm_plan(7, S_churn=1) is not edm_plan(7)


def test_plans_are_small():
    plan = edm_plan(18)
    assert plan.registers == 3 and max(len(s.terms) for s in plan.steps if isinstance(s, Combine)) <= 3

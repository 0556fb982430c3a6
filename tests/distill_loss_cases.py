"""The distillation losses as the papers write them, in ordinary torch, and checks that every version is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sign_fast import functional
from sign_fast.kernels import dispatch
from tests.oracle import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the smallest, odd sizes, CIFAR, a latent of 128 × 128, and what has to be split further
SHAPES = [(3, 64), (2, 1, 1, 1), (2, 3, 7, 5), (2, 3, 32, 32), (1, 4, 128, 128), (1, 3, 200, 130)]
ALPHA = 1.2
NAMES = ("images", "y_real", "y_fake")


@dataclass
class Case:
    """Inputs by name; weight is the student's, None for 1/omega."""

    tensors: dict[str, Tensor]
    sigma: Tensor
    weight: Tensor | None

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> Case:
        """A copy whose images and predictions want gradients."""
        tensors = {name: t.detach().to(device, dtype).requires_grad_() for name, t in self.tensors.items()}
        wide = torch.float64 if dtype == torch.float64 else None
        weight = None if self.weight is None else self.weight.to(device, wide)
        return Case(tensors, self.sigma.to(device, wide), weight)


def make(
    shape: tuple[int, ...], dtype: torch.dtype, *, weighted: bool = False, channels_last: bool = False, seed: int = 0
) -> Case:
    g = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name in NAMES}
    if channels_last:
        tensors = {name: t.contiguous(memory_format=torch.channels_last) for name, t in tensors.items()}
    sigma = torch.rand(shape[0], generator=g) * 4 + 0.05
    weight = torch.rand(shape[0], generator=g) + 0.1 if weighted else None
    return Case(tensors, sigma, weight)


def _kept(tensors: list[Tensor]) -> list[Tensor]:
    """NaN samples as zeros, the rest at least in float32."""
    bad = torch.zeros(tensors[0].shape[0], dtype=torch.bool, device=tensors[0].device)
    for t in tensors:
        bad = bad | t.detach().flatten(1).isnan().any(1)
    bad = bad.view(-1, *[1] * (tensors[0].ndim - 1))
    return [torch.where(bad, 0, t if t.dtype == torch.float64 else t.float()) for t in tensors]


def _rows(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


def _inverse_omega(x: Tensor, real: Tensor) -> Tensor:
    return 1 / (x - real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)


def plain_sid(case: Case) -> Tensor:
    x, real, fake = _kept(list(case.tensors.values()))
    weight = _inverse_omega(x, real) if case.weight is None else case.weight
    terms = (real - fake) * ((real - x) - ALPHA * (real - fake)) * _rows(weight, x)
    return terms.flatten(1).sum(1)


def plain_matching(case: Case) -> Tensor:
    x, real, fake = _kept(list(case.tensors.values()))
    weight = _inverse_omega(x, real) if case.weight is None else case.weight
    direction = ((fake - real) * _rows(weight, x)).detach()
    return 0.5 * ((x - (x - direction).detach()) ** 2).flatten(1).sum(1)


def plain_fake(case: Case) -> Tensor:
    x, fake = _kept([case.tensors["images"], case.tensors["y_fake"]])
    weight = (case.sigma**2 + 0.25) / (case.sigma * 0.5) ** 2
    return weight * ((fake - x) ** 2).flatten(1).sum(1)


def fast_sid(case: Case) -> Tensor:
    return functional.sid_generator_loss(*case.tensors.values(), ALPHA, weight=case.weight)


def fast_matching(case: Case) -> Tensor:
    return functional.distribution_matching_loss(*case.tensors.values(), weight=case.weight)


def fast_fake(case: Case) -> Tensor:
    return functional.fake_score_loss(case.tensors["y_fake"], case.tensors["images"], case.sigma)


LOSSES = {"sid": (fast_sid, plain_sid), "matching": (fast_matching, plain_matching), "fake": (fast_fake, plain_fake)}


def run(loss: Any, case: Case) -> tuple[Tensor, list[Tensor | None]]:
    """The losses, and the gradients of a sum that weighs each sample differently."""
    value = loss(case)
    upstream = torch.linspace(0.5, 1.5, value.shape[0], device=value.device, dtype=value.dtype)
    found = torch.autograd.grad(value, list(case.tensors.values()), upstream, allow_unused=True)
    return value.detach(), list(found)


def check(name: str, case: Case, device: str, implementation: str) -> None:
    """One loss and its gradients by rule 1, taken by `implementation`."""
    fast, plain = LOSSES[name]
    before = dispatch.taken["distill_loss", implementation]
    got, got_gradients = run(fast, case.to(device=device))
    assert dispatch.taken["distill_loss", implementation] == before + 1
    want, want_gradients = run(plain, case.to(torch.float64))
    base, base_gradients = run(plain, case.to())
    assert got.dtype == torch.float32
    _samples_close(got, want, base, name, terms(name, case.to(torch.float64)))
    for tensor, *three in zip(NAMES, got_gradients, want_gradients, base_gradients, strict=True):
        if three[1] is None:
            assert three[0] is None or not three[0].any()
            continue
        assert three[0].dtype == case.tensors[tensor].dtype
        assert three[0].stride() == case.tensors[tensor].stride()
        _samples_close(*three, f"{name}, gradient of {tensor}")


def _samples_close(got: Tensor, want: Tensor, base: Tensor, what: str, terms: Tensor | None = None) -> None:
    for b in range(want.shape[0]):  # sample by sample: their scales differ by orders of magnitude
        assert_close(got[b], want[b], base[b], f"{what}, sample {b}", None if terms is None else terms[b])


def terms(name: str, case: Case) -> Tensor:
    """The largest partial sum of magnitudes that a loss is added up from: (B,)."""
    t = dict(zip(NAMES, _kept(list(case.tensors.values())), strict=True))
    x, real, fake = t.values()
    if name != "sid":
        return torch.zeros(x.shape[0])
    weight = _inverse_omega(x, real) if case.weight is None else case.weight
    magnitude = (real - fake).abs() * ((real - x).abs() + ALPHA * (real - fake).abs())
    return (magnitude.flatten(1).sum(1) * weight).detach()


def with_nan(case: Case, *places: tuple[str, int]) -> Case:
    """NaN at the last element of these samples of these tensors."""
    for name, sample in places:
        case.tensors[name][sample].flatten()[-1:].fill_(torch.nan)  # a view: samples of the cases are contiguous
        assert case.tensors[name][sample].isnan().any()
    return case


def check_both(case: Case, device: str, implementation: str) -> None:
    """Both losses at once, by autograd and without it, are the two losses and their gradients."""
    one = case.to(device=device)
    student, fake = functional.distill_losses(*one.tensors.values(), one.sigma, ALPHA, weight=one.weight)
    assert torch.equal(student, fast_sid(one))
    kept = ~torch.stack([t.detach().flatten(1).isnan().any(1) for t in one.tensors.values()]).any(0)
    assert torch.equal(fake, torch.where(kept, fast_fake(one), 0))
    images, _, y_fake = one.tensors.values()
    assert torch.autograd.grad(fake.sum(), images, allow_unused=True, retain_graph=True)[0] is None
    d_student = torch.autograd.grad(student.sum() * 0.25, list(one.tensors.values()), retain_graph=True)
    (d_error,) = torch.autograd.grad(fake.sum() * 3, y_fake, retain_graph=True)
    both = torch.autograd.grad(student.sum() * 0.25 + fake.sum() * 3, y_fake)[0]
    scale = float(d_error.abs().max() + d_student[2].abs().max())
    eps = torch.finfo(y_fake.dtype).eps
    assert (both - (d_error + d_student[2])).abs().max() <= 4 * eps * scale
    before = dispatch.taken["distill_loss", implementation]
    found = functional.distill_loss_gradients(
        *(t.detach() for t in one.tensors.values()), one.sigma, ALPHA, weight=one.weight, student_scale=0.25,
        fake_scale=3.0,
    )  # fmt: skip
    assert dispatch.taken["distill_loss", implementation] == before + 1
    assert len(found) == 6
    # the same sums in another grouping
    for got, want in zip(found[:2], (student, fake), strict=True):
        assert torch.allclose(got, want.detach(), rtol=2e-6, atol=2e-6 * float(want.detach().abs().max()))
    for got, want in zip(found[2:], (*d_student, d_error), strict=True):
        assert got.stride() == want.stride()
        for b in range(got.shape[0]):
            assert (got[b] - want[b]).abs().max() <= 4 * eps * want[b].abs().max()
    some = functional.distill_loss_gradients(
        *(t.detach() for t in one.tensors.values()), one.sigma, ALPHA, weight=one.weight, wanted=(True, False, False)
    )
    assert [t.numel() > 0 for t in some[2:]] == [True, False, False, True]

"""What is compared: plain PyTorch, torch.compile of it, and the library; each a function from seeds to uint8 images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import Plain
from sign_fast import functional, models
from sign_fast.checkpoints.store import bundled_names, find, read_config
from sign_fast.errors import SignFastError, first_line
from sign_fast.models import preset_names
from sign_fast.sampling import SeededNoise, edm_sampler, few_step

PROVIDERS = ("plain", "compile", "sign_fast")
SAMPLERS: dict[str, Callable[..., Tensor]] = {"few_step": few_step, "edm": edm_sampler}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What is generated: network, sampler, steps, dtype and device; seed of weights where none are trained."""

    preset: str
    sampler: str
    steps: int
    dtype: str
    device: str
    seed: int = 0


def build_network(case: Case) -> Any:
    """The case's network in eval mode: trained weights of a bundled name or folder, else seeded random ones.

    A preset's own initial weights would not do: its last layers start near zero and hide every mistake.
    """
    if case.preset in bundled_names() or case.preset not in preset_names():
        return models.load(case.preset, case.device)
    generator = torch.Generator().manual_seed(case.seed)
    net = models.create(case.preset).eval().requires_grad_(False)
    for p in net.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
        else:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.to(case.device)


def describe_weights(case: Case) -> str:
    """ "trained" or "random", for the report."""
    if case.preset in bundled_names() or case.preset not in preset_names():
        return read_config(find(case.preset)).get("role", "trained")
    return "random"


class Provider:
    """One way to run a case.

    Args:
        name: of PROVIDERS.
        case: what to run.
        net: the network that all providers share; it is not changed.

    Raises:
        RuntimeError: this provider cannot run here; the message says why.
    """

    def __init__(self, name: str, case: Case, net: Any) -> None:
        self.name = name
        self.case = case
        dtype = DTYPES[case.dtype]
        if name == "sign_fast":
            self.net = copy.deepcopy(net).to(memory_format=torch.channels_last)
            self.net.dtype = dtype
        elif name == "plain":
            self.net = Plain(net, dtype).eval()
        elif name == "compile":
            channels_last = Plain(net, dtype).eval().to(memory_format=torch.channels_last)
            self.net = torch.compile(channels_last, mode="max-autotune", dynamic=False)
            self.net.sigma_min, self.net.sigma_max = net.sigma_min, net.sigma_max
        else:
            raise SignFastError(f"unknown provider {name!r}: known: {', '.join(PROVIDERS)}")
        self.shape = (net.img_channels, net.img_resolution, net.img_resolution)
        self.label_dim = net.label_dim

    @torch.no_grad()
    def images(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, H, W) floats."""
        noise = SeededNoise(self.case.device, seeds)
        latents = noise.randn([len(seeds), *self.shape])
        labels = None
        if self.label_dim:
            numbers = noise.randint(self.label_dim, size=[len(seeds)])
            labels = torch.nn.functional.one_hot(numbers, self.label_dim).float()
        sampler = SAMPLERS[self.case.sampler]
        return sampler(self.net, latents, labels, noise.randn_like, num_steps=self.case.steps)

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        """(B, H, W, C) uint8 on the device, complete when this returns."""
        images = functional.to_uint8(self.images(seeds))
        if images.is_cuda:
            torch.cuda.synchronize()
        return images


def try_provider(name: str, case: Case, net: Any, seeds: Sequence[int]) -> tuple[Provider | None, str]:
    """A provider that has run once, or None and the reason why it cannot run here."""
    try:
        provider = Provider(name, case, net)
        provider(seeds)
    except SignFastError:
        raise
    except Exception as error:
        if name != "compile":
            raise
        return None, f"{type(error).__name__}: {first_line(error)}"[:200]
    return provider, ""


def check(provider: Provider, plain: Provider, exact: Provider, seeds: Sequence[int]) -> str:
    """Empty if the provider computes what plain computes, else what is wrong.

    float32: both sum the same terms in another order; 2e-5 of the largest value is what the golden numbers allow, too.
    Where float32 convolutions are TF32 (CUDA's default), and in 16 bits, plain's own distance from true float32 is the
    measure, and twice that is allowed, plus one rounding of the dtype. Then no uint8 may be more than a level off.
    """
    with torch.backends.cudnn.flags(allow_tf32=False):
        want = exact.images(seeds).double()
    base, got = (p.images(seeds).double() for p in (plain, provider))
    scale = want.abs().max()
    error, base_error = (float((t - want).abs().max() / scale) for t in (got, base))
    if provider.case.dtype == "float32":
        bound = max(2e-5, 2 * base_error)
    else:
        bound = 2 * base_error + torch.finfo(DTYPES[provider.case.dtype]).eps
    if not error <= bound:
        return f"{provider.name}: error {error:.2e} of the largest value, {bound:.2e} is allowed"
    levels = (functional.to_uint8(got).int() - functional.to_uint8(base).int()).abs().max()
    if provider.case.dtype == "float32" and base_error <= 2e-5 and levels > 1:
        return f"{provider.name}: an image is {int(levels)} uint8 levels off, 1 is allowed"
    return ""

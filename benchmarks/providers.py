"""What is compared, each a function from seeds to uint8 images.

plain: the network in ordinary PyTorch, NCHW. compile: torch.compile of plain, max-autotune, channels_last; on a CPU
with freezing, on CUDA with its CUDA graphs. drop_in: the library's networks in place of the published ones, under the
Python samplers. sign_fast: the library's engine.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import Plain
from sign_fast import ImageGenerator, functional, models
from sign_fast.checkpoints.store import bundled_names, find, read_config
from sign_fast.errors import SignFastError
from sign_fast.models import preset_names
from sign_fast.nn import Conv2d
from sign_fast.sampling import SeededNoise, edm_sampler, few_step
from sign_fast.sampling.graphs import captured

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

    def calls(self) -> int:
        """Network calls of one generation."""
        return 2 * self.steps - 1 if self.sampler == "edm" else self.steps


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
            p.normal_(generator=generator).div_(p[0].numel() ** 0.5)  # in place: peak memory is measured
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
        net: the network that all providers share, in NCHW.
        own: `net` may be changed, so no second copy of the weights is held; else it stays as it is.

    Raises:
        RuntimeError: this provider cannot run here; the message says why.
    """

    def __init__(self, name: str, case: Case, net: Any, own: bool = False) -> None:
        self.name = name
        self.case = case
        self.shape = (net.img_channels, net.img_resolution, net.img_resolution)
        self.label_dim = net.label_dim
        self.net = self.network(net, own)

    def network(self, net: Any, own: bool) -> Any:
        """What the sampler calls."""
        raise NotImplementedError

    def with_steps(self, steps: int) -> Provider:
        """The same, compiled network and all, with another number of steps."""
        other = copy.copy(self)
        other.case = replace(self.case, steps=steps)
        return other

    def launches(self, batch: int) -> int | None:
        """Kernels that one forward pass launches; None where that is not known."""
        return None

    def captured_bytes(self) -> int | None:
        """Device memory that the CUDA graphs of this process hold; None where that is not known."""
        return None

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


class PlainProvider(Provider):
    """Ordinary PyTorch, NCHW; weights are cast at each call, as in the published networks."""

    def network(self, net: Any, own: bool) -> Any:
        return Plain(net, DTYPES[self.case.dtype]).eval()


class CompileProvider(Provider):
    """torch.compile of plain. One at a time: making another forgets what was compiled before."""

    def network(self, net: Any, own: bool) -> Any:
        torch._dynamo.reset()  # it compiles one function eight times, then never again
        net = (net if own else copy.deepcopy(net)).to(memory_format=torch.channels_last)
        for layer in net.modules():
            if isinstance(layer, Conv2d):
                layer.to(DTYPES[self.case.dtype])  # once, not at each call
        return _Compiled(Plain(net, DTYPES[self.case.dtype]).eval(), freezing=self.case.device == "cpu")


class _Compiled:
    """A compiled network; with freezing its weights are constants, and the first call has to know."""

    def __init__(self, net: Plain, freezing: bool) -> None:
        importlib.import_module("torch._inductor.select_algorithm").PRINT_AUTOTUNE = False  # tables by the dozen
        self.compiled = torch.compile(net, mode="max-autotune", dynamic=False)
        self.sigma_min, self.sigma_max, self.round_sigma = net.sigma_min, net.sigma_max, net.round_sigma
        self.freezing = freezing

    def __call__(self, *arguments: Any) -> Tensor:
        if not self.freezing:
            return self.compiled(*arguments)
        with torch._inductor.config.patch(freezing=True):
            images = self.compiled(*arguments)
        self.freezing = False  # patching takes time and has done its work
        return images


class DropIn(Provider):
    """The library's networks where the published ones were: channels_last, the samplers in Python."""

    def network(self, net: Any, own: bool) -> Any:
        net = (net if own else copy.deepcopy(net)).to(memory_format=torch.channels_last)
        net.dtype = DTYPES[self.case.dtype]
        return net


class EngineProvider(Provider):
    """`ImageGenerator`: the inference copy and the engine."""

    def network(self, net: Any, own: bool) -> Any:
        return ImageGenerator(net, dtype=DTYPES[self.case.dtype], consume=own)

    def launches(self, batch: int) -> int | None:
        return sum(self.net.net.launches(batch).values()) if self.case.device.startswith("cuda") else None

    def captured_bytes(self) -> int | None:
        if not self.case.device.startswith("cuda"):
            return None
        return sum(graphs["captured_bytes"] for graphs in captured())

    def images(self, seeds: Sequence[int]) -> Tensor:
        return self.net(seeds, self.case.steps, sampler=self.case.sampler, output="float")

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        images = self.net(seeds, self.case.steps, sampler=self.case.sampler)
        if images.is_cuda:
            torch.cuda.synchronize()
        return images


PROVIDERS: dict[str, type[Provider]] = {
    "plain": PlainProvider,
    "compile": CompileProvider,
    "drop_in": DropIn,
    "sign_fast": EngineProvider,
}


def make(name: str, case: Case, net: Any, own: bool = False) -> Provider:
    """The provider of that name, see `Provider`.

    Raises:
        SignFastError: there is no such provider.
    """
    if name not in PROVIDERS:
        raise SignFastError(f"unknown provider {name!r}: known: {', '.join(PROVIDERS)}")
    return PROVIDERS[name](name, case, net, own)


@dataclass(frozen=True)
class Reference:
    """What plain makes of some seeds, in float32 (`exact`) and in the case's dtype; float64, (B, C, H, W)."""

    exact: Tensor
    plain: Tensor


def reference(case: Case, net: Any, seeds: Sequence[int]) -> Reference:
    """Plain's images: what every provider's are compared with."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = make("plain", replace(case, dtype="float32"), net).images(seeds).double()
    if case.dtype == "float32" and case.device == "cpu":
        return Reference(exact, exact)
    return Reference(exact, make("plain", case, net).images(seeds).double())


def check(provider: Provider, expected: Reference, seeds: Sequence[int]) -> str:
    """Empty if the provider computes what plain computes, else what is wrong.

    float32: both sum the same terms in another order; 2e-5 of the largest value is what the golden numbers allow, too.
    Where float32 convolutions are TF32 (CUDA's default), and in 16 bits, plain's own distance from true float32 is the
    measure, and twice that is allowed, plus one rounding of the dtype. Then no uint8 may be more than a level off.
    """
    got = provider.images(seeds).double()
    scale = expected.exact.abs().max()
    error, base_error = (float((t - expected.exact).abs().max() / scale) for t in (got, expected.plain))
    if provider.case.dtype == "float32":
        bound = max(2e-5, 2 * base_error)
    else:
        bound = 2 * base_error + torch.finfo(DTYPES[provider.case.dtype]).eps
    if not error <= bound:
        return f"{provider.name}: error {error:.2e} of the largest value, {bound:.2e} is allowed"
    levels = (functional.to_uint8(got).int() - functional.to_uint8(expected.plain).int()).abs().max()
    if provider.case.dtype == "float32" and base_error <= 2e-5 and levels > 1:
        return f"{provider.name}: an image is {int(levels)} uint8 levels off, 1 is allowed"
    return ""

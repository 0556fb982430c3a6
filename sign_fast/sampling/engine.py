"""The engine: a generation from seeds to bytes in one C++ call on the CPU, in one CUDA graph on a GPU."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import SignFastError
from ..inference.conditioning import Conditioning
from ..inference.optimized import OptimizedNet, optimize
from ..kernels import extension
from ..models.precond import Precond
from .buckets import LARGEST_BUCKET, pad
from .graphs import GraphKey, Graphs, generate_in_buckets, network_token
from .loop import Correction, corrected, draw_ahead, run_plan
from .noise import PhiloxNoise, SeededNoise
from .plan import Plan, Prepared
from .plans import plan_of
from .requests import Noise, Output, Sampler, check_choices, is_time_free
from .transfer import to_device

_PLANS_KEPT = 64


class Engine:
    """A network ready to generate.

    On the CPU the loop over the network's calls runs in C++, for networks of `sign_fast.models` with the network
    itself; on CUDA the whole generation is a graph, captured at its first use, see `graphs`. Safe to use from several
    threads.

    Args:
        net: a network of `sign_fast.models` (an inference copy is made of it: `net.update` of this engine takes later
            weights), one that `optimize` has made, or any denoiser net(x, sigma, class_labels), or student
            net(x, class_labels) with time_free = True; a module is put in eval mode. On CUDA a module is captured:
            its parameters and buffers may change, but what else it reads is what it was at its capture. A denoiser
            that is no module says where it is with `device` (else: the CPU) and is called each time.
        dtype: of the inner network: float32, bfloat16 or float16; None keeps its own.
        consume: the network is not used elsewhere: its memory is freed as its copy is made.
        noise: "torch" (the published generators, one a seed) or "philox" (drawn inside the launch).
        max_graphs: CUDA graphs kept.

    Raises:
        SignFastError: an unknown noise or dtype, a dtype for a network that takes none, or a network that does not
            say the shape of its images.
    """

    def __init__(
        self,
        net: Any,
        *,
        dtype: torch.dtype | None = None,
        consume: bool = False,
        noise: Noise = "torch",
        max_graphs: int = 16,
    ) -> None:
        check_choices(dtype, noise)
        if lacks := [name for name in ("img_resolution", "img_channels") if not hasattr(net, name)]:
            raise SignFastError(f"the network does not say its {' and '.join(lacks)}: set them as attributes")
        self._net = _prepared_net(net, dtype, consume)
        self.noise = noise
        self._max_graphs = max_graphs
        self._token = network_token()
        self._lock = threading.Lock()
        self._graphs: Graphs | None = None
        self._plans: OrderedDict[Any, Prepared] = OrderedDict()
        self.img_resolution: int = net.img_resolution
        self.img_channels: int = net.img_channels
        self.label_dim: int = getattr(net, "label_dim", 0)

    @property
    def net(self) -> Any:
        """The network that generates: an `OptimizedNet`, or the denoiser that was given."""
        return self._net

    @property
    def device(self) -> torch.device:
        """Where the network is: where it says, or where its parameters are."""
        said = getattr(self._net, "device", None)
        if isinstance(said, torch.device | str):
            return torch.device(said)
        first = next(self._net.parameters(), None) if isinstance(self._net, nn.Module) else None
        return torch.device("cpu") if first is None else first.device

    @property
    def graphs(self) -> Graphs:
        """The captured generations of this network; CUDA only."""
        with self._lock:
            if self._graphs is None:
                self._graphs = Graphs(self.device, self._max_graphs)
            return self._graphs

    def check(self, sampler: str | Sampler, steps: int, options: Mapping[str, Any]) -> None:
        """Raise the SignFastError that `generate` would raise for a sampler's options; generate nothing."""
        if not callable(sampler):
            self._prepare(sampler, steps, options)

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        sampler: str | Sampler,
        steps: int,
        labels: Sequence[int] | None,
        output: Output = "uint8",
        **options: Any,
    ) -> Tensor:
        """Images of the seeds, in memory of their own.

        Args:
            seeds, sampler, steps, labels, options: as `requests.check_request` leaves them.
            output: "uint8" for (B, H, W, C) bytes, "float" for (B, C, H, W) float32 in about [-1, 1].
        """
        if callable(sampler):
            return self._sampled(sampler, seeds, steps, labels, output, options)
        prepared = self._prepare(sampler, steps, options)
        # in parts: the noise of all steps is drawn ahead, and of very many images would fill the memory
        parts = [slice(start, start + LARGEST_BUCKET) for start in range(0, len(seeds), LARGEST_BUCKET)]
        images = [self._generate(prepared, seeds[p], None if labels is None else labels[p], output) for p in parts]
        return images[0] if len(images) == 1 else torch.cat(images)

    @torch.no_grad()
    def edit(
        self,
        plan: Plan,
        images: Tensor,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        correction: Correction | None = None,
        output: Output = "float",
    ) -> Tensor:
        """Images made from given ones: a plan whose draw 0 is the images, its other draws noise of the seeds.

        Args:
            plan: e.g. `students.projection_plan`.
            images: (B, img_channels, H, W), cast to float32; on any device.
            seeds: B of them, as `noise.check_seeds` leaves them; equal ones draw equal noise.
            labels: B class numbers; None means none, also where the network has classes.
            correction: follows each call of the network; part of the launch.
            output: as in `generate`.
        """
        prepared = self._cached(plan, lambda: plan)
        images = to_device(images.float().contiguous(), self.device)
        known = {} if correction is None else {f"known{i}": t for i, t in enumerate(correction.tensors)}
        known = {name: to_device(t, self.device).expand(len(seeds), *t.shape[1:]) for name, t in known.items()}
        made = []
        for start in range(0, len(seeds), LARGEST_BUCKET):
            part = slice(start, start + LARGEST_BUCKET)
            draws = draw_ahead(plan, images[part], self._noise(seeds[part]).randn_like)
            inputs = {f"draw{i}": draw for i, draw in enumerate(draws)} | {n: t[part] for n, t in known.items()}
            if labels is not None:
                inputs["labels"] = to_device(torch.tensor(labels[part], dtype=torch.int64), self.device)
            made.append(self._made(prepared, inputs, len(draws[0]), output, correction))
        return made[0] if len(made) == 1 else torch.cat(made)

    @torch.no_grad()
    def rehearse(self, sampler: str, steps: int, batch: int, *, labels: bool, **options: Any) -> None:
        """Run generations as graphs would capture them, for an engine on the meta device: shapes only.

        Both kinds of noise and of output; a call of the network that is like one before is not made anew.

        Args:
            sampler, steps, options: as `generate` takes them.
            batch: images.
            labels: whether there are class numbers.
        """
        prepared = self._prepare(sampler, steps, options)
        plan, device = prepared.plan, self.device
        inputs = self._constants(prepared)
        if labels:
            inputs["labels"] = torch.empty(batch, dtype=torch.int64, device=device)
        denoiser = self._denoiser(prepared, inputs)
        known: dict[Hashable, Tensor] = {}

        def once(x: Tensor, level: int) -> Tensor:
            like = (x.shape, x.stride(), x.dtype, level)  # levels lie at other offsets
            if like not in known:
                known[like] = denoiser(x, level)
            return torch.empty_like(known[like])

        drawn = draw_ahead(plan, torch.empty((batch, *self._shape), device=device), torch.empty_like)
        seeds = torch.empty(batch, dtype=torch.int64, device=device)
        for given in ({f"draw{i}": draw for i, draw in enumerate(drawn)}, {"seeds": seeds}):
            images = run_plan(plan, once, self._draws(plan, given), prepared.coefficients)
            _finished(images, "uint8")
            _finished(images, "float")

    def _sampled(
        self,
        sampler: Sampler,
        seeds: Sequence[int],
        steps: int,
        labels: Sequence[int] | None,
        output: Output,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Images by a sampler of the caller's."""
        noise = self._noise(seeds)
        latents = noise.randn([len(seeds), *self._shape], dtype=torch.float32)
        one_hot = self._one_hot(self._classes(noise, len(seeds), labels))
        images = sampler(self._net, latents, one_hot, noise.randn_like, num_steps=steps, **options)
        return _finished(images, output)

    def _generate(
        self, prepared: Prepared, seeds: Sequence[int], labels: Sequence[int] | None, output: Output
    ) -> Tensor:
        """Images of at most `LARGEST_BUCKET` seeds by one of the library's samplers."""
        noise, count = self._noise(seeds), len(seeds)
        if isinstance(noise, PhiloxNoise):
            inputs = {"seeds": noise.seeds}
            classes = self._classes(noise, count, labels)
        else:  # the published order: latents, labels, the noise of the steps
            latents = noise.randn([count, *self._shape], dtype=torch.float32)
            classes = self._classes(noise, count, labels)
            draws = draw_ahead(prepared.plan, latents, noise.randn_like)
            inputs = {f"draw{i}": draw for i, draw in enumerate(draws)}
        if classes is not None:
            inputs["labels"] = classes
        return self._made(prepared, inputs, count, output)

    def _made(
        self,
        prepared: Prepared,
        inputs: Mapping[str, Tensor],
        count: int,
        output: Output,
        correction: Correction | None = None,
    ) -> Tensor:
        if self._is_captured:
            return self._replay(prepared, inputs, count, output, correction)
        return self._run(prepared, {**inputs, **self._constants(prepared)}, output, correction=correction)

    def _noise(self, seeds: Sequence[int]) -> SeededNoise | PhiloxNoise:
        return (SeededNoise if self.noise == "torch" else PhiloxNoise)(self.device, seeds)

    @property
    def _is_captured(self) -> bool:
        """Whether generations are graphs: of a module on CUDA, whose tensors can be watched."""
        return self.device.type == "cuda" and isinstance(self._net, nn.Module)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.img_channels, self.img_resolution, self.img_resolution

    def _classes(self, noise: SeededNoise | PhiloxNoise, count: int, labels: Sequence[int] | None) -> Tensor | None:
        """(B,) int64 class numbers, drawn from the seeds where none are given."""
        if self.label_dim == 0:
            return None
        # drawn even where labels are given, as published: the noise after it depends on that
        drawn = noise.randint(self.label_dim, size=[count]) if labels is None or self.noise == "torch" else None
        return drawn if labels is None else to_device(torch.tensor(labels, dtype=torch.int64), self.device)

    def _one_hot(self, classes: Tensor | None) -> Tensor | None:
        """(B, label_dim) float32; torch's own one_hot looks at the values, which a capture does not allow."""
        if classes is None:
            return None
        return (classes[:, None] == torch.arange(self.label_dim, device=classes.device)).float()

    def _prepare(self, sampler: str, steps: int, options: Mapping[str, Any]) -> Prepared:
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        key = (sampler, steps, tuple(sorted(values.items())))
        return self._cached(key, lambda: plan_of(self._net, sampler, steps, values))

    def _cached(self, name: Hashable, make: Callable[[], Plan]) -> Prepared:
        device = self.device
        key = (name, device)
        with self._lock:
            prepared = self._plans.get(key)
            if prepared is None:
                prepared = self._plans[key] = Prepared(make(), device)
                if len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return prepared

    def _conditioning(self, prepared: Prepared) -> Conditioning:
        return self._net.conditioning(prepared.plan.levels)

    def _constants(self, prepared: Prepared) -> dict[str, Tensor]:
        """Inputs that are the same for all images of a plan."""
        if not isinstance(self._net, OptimizedNet):
            return {"levels": prepared.levels}
        conditioning = self._conditioning(prepared)
        return {"levels": conditioning.device_coefficients, "conditioning": conditioning.held}

    def _run(
        self,
        prepared: Prepared,
        inputs: Mapping[str, Tensor],
        output: Output,
        coefficients: Tensor | None = None,
        correction: Correction | None = None,
    ) -> Tensor:
        """The generation itself: what is replayed on CUDA. Nothing here waits for the device.

        Args:
            coefficients: in place of the plan's own, to be inputs of a graph.
            correction: of draw 0, after each call.
        """
        plan, net, labels = prepared.plan, self._net, inputs.get("labels")
        module = extension.module()
        if isinstance(net, OptimizedNet) and net.native is not None and module is not None and correction is None:
            weight, bias = self._conditioning(prepared).affines
            return module.generate(  # type: ignore[no-any-return]
                plan=plan.native,
                program=net.native,
                level_coefficients=inputs["levels"],
                held=inputs["conditioning"],
                weight=weight,
                bias=bias,
                labels=labels,
                draws=[] if "seeds" in inputs else self._draws(plan, inputs),
                seeds=inputs.get("seeds"),
                shape=self._shape,
                coefficients=coefficients,
                bytes=output == "uint8",
            )
        draws = self._draws(plan, inputs)
        denoiser = self._denoiser(prepared, inputs)
        if correction is not None:
            denoiser = corrected(
                denoiser, correction, draws[0], [t for n, t in inputs.items() if n.startswith("known")]
            )
        return _finished(run_plan(plan, denoiser, draws, coefficients), output)

    def _draws(self, plan: Plan, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The plan's draws, made of the seeds where these are given."""
        if "seeds" in inputs:
            return [functional.philox_normal(inputs["seeds"], i, self._shape) for i in range(plan.draws)]
        return [inputs[f"draw{i}"] for i in range(plan.draws)]

    def _denoiser(self, prepared: Prepared, inputs: Mapping[str, Tensor]) -> Callable[[Tensor, int], Tensor]:
        net, labels, levels = self._net, inputs.get("labels"), inputs["levels"]
        if isinstance(net, OptimizedNet):
            conditioning = self._conditioning(prepared)
            held = inputs["conditioning"]
            return lambda x, level: net.denoise(x, conditioning.rows_of(held[level], labels), levels[level])
        one_hot = self._one_hot(labels)
        if is_time_free(net):
            return lambda x, level: net(x) if one_hot is None else net(x, one_hot)
        return lambda x, level: net(x, levels[level], one_hot)

    def _replay(
        self,
        prepared: Prepared,
        inputs: Mapping[str, Tensor],
        count: int,
        output: Output,
        correction: Correction | None,
    ) -> Tensor:
        """The images through a graph of each bucket."""
        constants = self._constants(prepared) | {"coefficients": prepared.coefficients}
        key = GraphKey(
            network=self._token,
            bucket=0,
            plan=(prepared.plan.structure, None if correction is None else correction.key),
            dtype=getattr(self._net, "dtype", None) or torch.float32,
            conditional="labels" in inputs,
            noise=self.noise,
            output=output,
        )

        def part(start: int, stop: int, bucket: int) -> dict[str, Tensor]:
            return {name: pad(t[start:stop], bucket) for name, t in inputs.items()} | constants

        def run(static: Mapping[str, Tensor]) -> Tensor:
            return self._run(prepared, static, output, static["coefficients"], correction)

        return generate_in_buckets(self.graphs, count, key, part, run, self._watched, constants)

    def _watched(self) -> Iterable[Tensor]:
        """What a graph of this network reads besides its inputs."""
        if isinstance(self._net, OptimizedNet):
            return self._net.constants
        return itertools.chain(self._net.parameters(), self._net.buffers()) if isinstance(self._net, nn.Module) else ()


def _finished(images: Tensor, output: Output) -> Tensor:
    return functional.to_uint8(images) if output == "uint8" else images.float()


def _prepared_net(net: Any, dtype: torch.dtype | None, consume: bool) -> Any:
    """What will be called: an inference copy of a library's network, otherwise the network itself in eval mode."""
    if isinstance(net, OptimizedNet):
        if dtype not in (None, net.dtype):
            raise SignFastError(f"this network is optimized for {net.dtype}: optimize the original for {dtype}")
        return net
    if isinstance(net, Precond):
        device = next(net.parameters()).device
        own = net.dtype or (torch.float16 if net.use_fp16 and device.type == "cuda" else torch.float32)
        return optimize(net, dtype or own, consume=consume, lean=True)
    if dtype is not None:
        if not hasattr(net, "dtype"):
            raise SignFastError("this network takes no dtype: leave it away, or use one of sign_fast.models")
        net = copy.copy(net)  # shares the weights; the caller's network keeps its dtype
        net.dtype = dtype
    return net.eval() if isinstance(net, nn.Module) else net

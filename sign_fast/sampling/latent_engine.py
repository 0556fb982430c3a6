"""Few-step text-to-image as one launch: every network call, the noise between them, the decoder, the bytes."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .. import functional
from .buckets import pad, thrifty_bucket_of
from .graphs import GraphKey, Graphs, generate_in_buckets, network_token
from .loop import draw_ahead, run_plan
from .plan import Plan, Prepared
from .students import LatentPrediction, RandnLike, StepNoise, few_step_latent_plan
from .text import TextConditioning
from .transfer import to_device

Predict: TypeAlias = Callable[[Tensor, Tensor, TextConditioning], Tensor]
LatentOutput: TypeAlias = Literal["latent", "float", "uint8"]

_PLANS_KEPT = 64
_STATES_KEPT = 64


class LatentEngine:
    """A few-step student of latents, its decoder behind it, ready to generate.

    On the CPU the loop over the network's calls runs in C++; on CUDA a whole generation, decoder included, is a graph,
    captured at its first use, of which there is one per bucket of images, number of steps, kind of noise, shape of the
    latents and of the embeddings, and output. What the graph reads may change where it lies: new values count; a
    parameter, buffer or `state` that is replaced costs a new capture, and one warning. Safe to use from several
    threads.

    Args:
        predict: predict(x, t, text) -> (B, C, H, W) float32: x (B, C, H, W) float32, t (B,) float64, the step 0 … 999
            of "epsilon" and "v", the time in (0, 1] of "flow". It does not synchronise.
        networks: the modules that predict and decode read, the denoiser first: all are put in eval mode and watched.
        decode: latents (B, C, H, W) float32 -> images (B, 3, 8H, 8W) in about [-1, 1]; None where latents suffice.
        prediction: what the network predicts.
        bars: ᾱ_t of its schedule, t = 0 … 999; None for the published one.
        state: what else a capture reads, such as the scales of adapters, as something hashable; asked at every call.
        max_graphs: CUDA graphs kept.
    """

    def __init__(
        self,
        predict: Predict,
        networks: Sequence[nn.Module],
        decode: Callable[[Tensor], Tensor] | None = None,
        *,
        prediction: LatentPrediction = "epsilon",
        bars: tuple[float, ...] | None = None,
        state: Callable[[], Hashable] = lambda: None,
        max_graphs: int = 16,
    ) -> None:
        self._predict = predict
        self._networks = [network.eval() for network in networks]
        self._decode = decode
        self.prediction: LatentPrediction = prediction
        self._bars = bars
        self._state = state
        self._max_graphs = max_graphs
        self._token = network_token()
        self._lock = threading.Lock()
        self._graphs: Graphs | None = None
        self._plans: OrderedDict[tuple[Plan, torch.device], Prepared] = OrderedDict()
        self._states: OrderedDict[Hashable, int] = OrderedDict()
        self._numbers = itertools.count(1)
        self._mark = torch.empty(())

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self._networks[0].parameters()).device

    @property
    def graphs(self) -> Graphs:
        """The captured generations; CUDA only."""
        with self._lock:
            if self._graphs is None or self._graphs.device != self.device:
                self._graphs = Graphs(self.device, self._max_graphs)
            return self._graphs

    def plan(self, steps: int, noise: StepNoise = "fresh") -> Plan:
        """What a generation does; its draws are the latents and the noises of the steps.

        Raises:
            ValueError: as `students.few_step_latent_plan`.
        """
        return few_step_latent_plan(steps, self.prediction, noise, torch.float32, self._bars)

    @torch.no_grad()
    def generate(
        self,
        latents: Tensor,
        text: TextConditioning,
        steps: int,
        noise: StepNoise = "fresh",
        randn_like: RandnLike = torch.randn_like,
        output: LatentOutput = "uint8",
    ) -> Tensor:
        """Images of the latents and the embeddings, in memory of their own.

        Args:
            latents: (B, C, H, W) standard normal.
            text: of B rows.
            steps: K.
            noise: of the steps after the first.
            randn_like: draws fresh noise, (B, C, H, W) float32, before the launch.
            output: "latent" for (B, C, H, W) float32, "float" for the decoder's images in float32, "uint8" for
                (B, 8H, 8W, 3) bytes.

        Raises:
            ValueError: steps < 1, an unknown choice, a number of rows other than the latents', or no decoder.
            SignFastError: on CUDA, as `Graphs.run`.
        """
        if len(text) != len(latents):
            raise ValueError(f"{len(text)} rows of embeddings for {len(latents)} latents: give one each")
        if output not in ("latent", "float", "uint8"):
            raise ValueError(f"output must be latent, float or uint8, not {output!r}")
        if output != "latent" and self._decode is None:
            raise ValueError('without a decoder the output is "latent"')
        prepared = self._prepared(self.plan(steps, noise))
        draws = draw_ahead(prepared.plan, latents.float(), randn_like)
        inputs = {f"draw{i}": to_device(draw, self.device) for i, draw in enumerate(draws)}
        inputs |= {name: to_device(t, self.device) for name, t in text.tensors().items()}
        if self._is_captured:
            return self._replay(prepared, inputs, len(latents), noise, output)
        return self._run(prepared, {**inputs, "levels": prepared.levels}, output)

    def rehearse(self, latents: Tensor, text: TextConditioning, steps: int, noise: StepNoise = "fresh") -> None:
        """Run a generation as a graph would capture it, for networks on the meta device: shapes only.

        Args:
            latents, text, steps, noise: as `generate` takes them.
        """
        prepared = self._prepared(self.plan(steps, noise))
        draws = draw_ahead(prepared.plan, latents, torch.empty_like)
        inputs = {f"draw{i}": draw for i, draw in enumerate(draws)} | text.tensors() | {"levels": prepared.levels}
        outputs: tuple[LatentOutput, ...] = ("uint8", "float")
        for output in outputs:
            self._run(prepared, inputs, output, prepared.coefficients)

    @property
    def _is_captured(self) -> bool:
        return self.device.type == "cuda"

    def _prepared(self, plan: Plan) -> Prepared:
        key = (plan, self.device)
        with self._lock:
            prepared = self._plans.setdefault(key, Prepared(*key))
            self._plans.move_to_end(key)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
            return prepared

    def _run(
        self,
        prepared: Prepared,
        inputs: Mapping[str, Tensor],
        output: LatentOutput,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """The generation itself: what is replayed on CUDA. Nothing here waits for the device."""
        draws = [inputs[f"draw{i}"] for i in range(prepared.plan.draws)]
        text, levels, rows = TextConditioning.of(inputs), inputs["levels"], len(draws[0])

        def denoiser(x: Tensor, level: int) -> Tensor:
            return self._predict(x, levels[level].expand(rows), text)

        latents = run_plan(prepared.plan, denoiser, draws, coefficients)
        if output == "latent" or self._decode is None:
            return latents
        images = self._decode(latents).float()
        return functional.to_uint8(images) if output == "uint8" else images

    def _replay(
        self, prepared: Prepared, inputs: Mapping[str, Tensor], count: int, noise: StepNoise, output: LatentOutput
    ) -> Tensor:
        """The images through a graph of each bucket."""
        constants = {"levels": prepared.levels, "coefficients": prepared.coefficients}
        key = GraphKey(
            network=self._token,
            bucket=0,
            plan=prepared.plan.structure,
            dtype=next(self._networks[0].parameters()).dtype,
            conditional=True,
            noise=noise,
            output=output,
        )

        def part(start: int, stop: int, bucket: int) -> dict[str, Tensor]:
            return {name: pad(t[start:stop], bucket) for name, t in inputs.items()} | constants

        def run(static: Mapping[str, Tensor]) -> Tensor:
            return self._run(prepared, static, output, static["coefficients"])

        return generate_in_buckets(
            self.graphs, count, key, part, run, self._watched, constants, choose=thrifty_bucket_of
        )

    def _watched(self) -> Iterable[Tensor]:
        """What a graph reads besides its inputs, and a mark of another shape for every other state."""
        for network in self._networks:
            yield from _tensors(network)
        state = self._state()
        number = self._states.pop(state, None) or next(self._numbers)
        self._states[state] = number
        while len(self._states) > _STATES_KEPT:  # one that comes again is another number, and captured again
            self._states.popitem(last=False)
        yield self._mark.expand(number)


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    """Its parameters and buffers, faster than nn.Module lists them, which makes up their names."""
    waiting: list[nn.Module | None] = [network]
    for module in waiting:  # which grows meanwhile
        if module is None:
            continue
        values = module.__dict__
        for tensor in (*values["_parameters"].values(), *values["_buffers"].values()):
            if tensor is not None:
                yield tensor
        if children := values["_modules"]:
            waiting.extend(children.values())

"""Teacher, fake score, student and average of a text-to-image distillation: UNets of diffusers."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import SignFastError, first_line
from ...integrations.diffusers import accelerate
from ...integrations.diffusers.parts import Parts
from ...sampling.text import TextConditioning
from ...training.loop import PRECISIONS
from ...training.processes import place
from ..discriminator import pooled_logits
from ..parallel import shard
from .settings import TextToImageSettings

ADAPTERS = "lora_"
"""In the names of the adapters' parameters, and of no others."""
_CAST = (nn.Conv2d, nn.Linear)  # what autocast runs in low precision with its weights cast
_SHARDED = ("BasicTransformerBlock", "ResnetBlock2D")
_ADAPTED = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
)


class _MiddleReached(Exception):
    """Ends a forward pass of which only the middle block is wanted."""


class LatentNetwork(nn.Module):
    """predict(x, t, text) of a UNet, in low precision over weights of any.

    Args:
        unet: UNet2DConditionModel.
        parts: of the pipeline: what the UNet predicts.
        dtype: of its convolutions and products; float32 leaves it as it is.
    """

    def __init__(self, unet: Any, parts: Parts, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype
        self._predict = parts.predictor(unet)

    def forward(
        self, x: Tensor, t: Tensor, text: TextConditioning, features: Literal["also", "only"] | None = None
    ) -> Any:
        """The prediction (B, C, H, W) in x's dtype; "also": and the logits; "only": those alone, the decoder at rest.

        Logits (B, 1, h, w) are the channel mean of the middle block's output, at least float32.
        """
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            if features == "only":
                raise _MiddleReached

        # not cached: a cache would hold whole weights of a network in shards, and no weight is used twice in a pass
        cast = torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)
        with cast:
            if features is None:
                return self._predict(x, t, text)
            hook = self.unet.mid_block.register_forward_hook(keep)
            try:
                output = self._predict(x, t, text)
            except _MiddleReached:
                output = None
            finally:
                hook.remove()
        logits = pooled_logits(found[0])
        return logits if output is None else (output, logits)


@dataclass
class LatentNetworks:
    """What a text-to-image distillation works with.

    Args:
        teacher: T, frozen.
        fake: F; with adapters its other weights are the teacher's, in the same memory.
        student: G.
        ema: the average of the student's weights, frozen.
        frozen: None, which other methods have.
    """

    teacher: LatentNetwork
    fake: LatentNetwork
    student: LatentNetwork
    ema: LatentNetwork
    frozen: None = None


def build_latent_networks(parts: Parts, settings: TextToImageSettings, device: torch.device) -> LatentNetworks:
    """Fake score, student and average as copies of the teacher's UNet.

    Weights that are trained, and the average, are float32. In 16 bits those of the teacher's convolutions and linear
    layers are cast once: the same numbers as casting them in every call.

    Args:
        parts: of the teacher, its UNet in float32; it becomes the teacher and is changed.
        settings: of the run.
        device: of the run; with FSDP2 networks go there in shards.
    """
    s = settings
    dtype = PRECISIONS[s.precision]
    sharded = s.parallel == "fsdp" and place()[1] > 1
    teacher = parts.unet.eval().requires_grad_(False)
    if not sharded:
        teacher = teacher.to(device, memory_format=torch.channels_last)
    if s.checkpointing:
        teacher.enable_gradient_checkpointing()  # its copies too

    def network(unet: Any) -> LatentNetwork:
        net = LatentNetwork(unet, parts, dtype)
        blocks = [m for m in net.modules() if type(m).__name__ in _SHARDED]
        if s.accelerate:  # changes the classes of modules, in place
            accelerate(net.unet, channels_last=not sharded)
        if sharded:
            shard(net, device, blocks)
        return net

    # one after another, so that of those that go to the device in shards two at most are whole
    student = network(copy.deepcopy(teacher).train().requires_grad_(True))
    ema = network(copy.deepcopy(teacher))
    fake = None if s.fake_lora else network(copy.deepcopy(teacher).train().requires_grad_(True))
    if dtype != torch.float32:
        _cast(teacher, dtype)
    if fake is None:
        fake = network(with_adapters(teacher, s.fake_lora, s.seed))
    return LatentNetworks(network(teacher), fake, student, ema)


def _cast(unet: nn.Module, dtype: torch.dtype) -> None:
    for module in unet.modules():
        if isinstance(module, _CAST):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(dtype)


def with_adapters(unet: Any, rank: int, seed: int) -> Any:
    """A UNet with the tensors of another and LoRA on its attention, feed-forward and convolution layers.

    It starts as the other: the adapters' second factors are 0. A module tree of its own needs no switching of adapters,
    which checkpointing would recompute in the wrong position.

    Args:
        unet: frozen.
        rank: of the adapters, whose weights are float32.
        seed: of their first factors, the same on all processes.

    Raises:
        SignFastError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise SignFastError(
            f"--fake-lora needs peft ({first_line(error)}): pip install 'sign-fast[diffusers]'"
        ) from error
    with torch.device("meta"):
        adapted = type(unet).from_config(unet.config)
    adapted.load_state_dict(unet.state_dict(), assign=True)
    if any(t.is_meta for t in itertools.chain(adapted.parameters(), adapted.buffers())):
        raise SignFastError("this UNet holds weights that are not in its state: leave --fake-lora away")
    adapted.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_ADAPTED)), "fake")
    for name, p in adapted.named_parameters():
        if ADAPTERS in name:
            # the strides of gradients, for which DDP would copy and warn; 1×1 ones have them only in new memory
            layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
            p.data = torch.empty_like(p, dtype=torch.float32, memory_format=layout).copy_(p)
    if unet.is_gradient_checkpointing:
        adapted.enable_gradient_checkpointing()
    return adapted.train()


def unet_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's own names in a state of a `LatentNetwork`."""
    return {name.removeprefix("unet."): value for name, value in state.items()}

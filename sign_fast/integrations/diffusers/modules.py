"""diffusers' modules with sign_fast's operations inside: subclasses that a module is made by setting its `__class__`.

Parameters, children, names, state, hooks and isinstance stay what they were. Each has its parent's name, by which
accelerate's `_no_split_modules` and diffusers' `_repeated_blocks` look for it. Children are called, not looked into, so
that hooks, offloading and LoRA layers in their places do what they do; only a plain convolution's bias is taken out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import resnet
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn

from ... import functional
from ...kernels.convolution.op import supports as supports_convolution
from ...kernels.device import interpreting
from ...kernels.dispatch import Reason, fall_back
from .classes import untouched, unwatched
from .joins import Follower, expects_follower, join, take

_ACTIVATED = "_sign_fast_activated"
FOLLOWER = "_sign_fast_follower"
"""The attribute with the `Follower` of a module's output; absent where it goes elsewhere."""
ACTIVATION = "_sign_fast_activation"
"""The attribute with the `SiLU` that a `GroupNormSiLU`'s caller goes on with."""


def follower_of(module: nn.Module) -> Follower | None:
    return module.__dict__.get(FOLLOWER)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of (B, C, H, W) or (B, C, T), with what surrounds it where the caller says so."""

    def forward(
        self,
        input: Tensor,
        *,
        emb: Tensor | None = None,
        input_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: functional.Activation = None,
    ) -> Tensor:
        """silu(norm(input + emb + input_bias)·(1 + scale) + shift); see `functional.group_norm_silu`."""
        if input.ndim == 3:  # tokens: an image of one row
            return self.forward(input.unsqueeze(2), activation=activation).squeeze(2)
        if input.ndim != 4:
            y = super().forward(input)
            return y if activation is None else F.silu(y)
        if emb is None and input_bias is None and scale is None and shift is None:
            brought = take(input, self, activation == "silu")
            if brought is not None:
                return brought
        return functional.group_norm_silu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            emb=emb,
            input_bias=input_bias,
            scale=scale,
            shift=shift,
            activation=activation,
        )


class GroupNormSiLU(GroupNorm):
    """GroupNorm whose caller goes on with a SiLU, which is in it already and which `SiLU` then leaves out."""

    def forward(self, input: Tensor, **surroundings: Any) -> Tensor:
        reason = pair_reason(self)
        if reason is not None:
            if not torch.compiler.is_compiling():
                fall_back("a norm of diffusers", reason)
            return super().forward(input, **surroundings)
        y = super().forward(input, **{"activation": "silu", **surroundings})
        setattr(y, _ACTIVATED, True)
        return y


class SiLU(nn.SiLU):
    """SiLU of all but what `GroupNormSiLU` has made."""

    def forward(self, input: Tensor) -> Tensor:
        return input if getattr(input, _ACTIVATED, False) else super().forward(input)


# The filters are transformed in every call, for which that many pixels make up: measured, and independent of channels
_WINOGRAD_PIXELS = 512


class Conv2d(nn.Conv2d):
    """A 3×3 convolution that is `functional.convolution` where that is faster: float32, CPU, enough pixels."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            input.is_cpu
            and input.ndim == 4
            and input.shape[0] * input.shape[2] * input.shape[3] >= _WINOGRAD_PIXELS
            and supports_convolution(input, self.weight, self.bias) is None
            and convolution_reason(self) is None  # it may have been made another's since
        ):
            return functional.convolution(input, self.weight, self.bias)
        return super().forward(input)


def _folds_biases(x: Tensor) -> bool:
    """Whether a convolution's bias is a pass of its own there: cuDNN's is, the CPU's library adds it on the way."""
    return not x.is_cpu or interpreting()


def _without_bias(convolution: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution's output but for the bias that is returned, which whatever reads the output next adds."""
    if (
        type(convolution) in (nn.Conv2d, Conv2d)
        and convolution.bias is not None
        and convolution.padding_mode == "zeros"
        and _folds_biases(x)
        and untouched(convolution)
    ):
        c: Any = convolution
        return F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups), c.bias
    return convolution(x), None


class ResnetBlock2D(resnet.ResnetBlock2D):  # type: ignore[misc]
    """Both norms with their SiLU, the time embedding and convolution's bias before, scale and shift after; the join."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """input_tensor (B, C, H, W), temb (B, E) or None -> (B, C', H', W')."""
        reason = block_reason(self)
        if reason is not None and not torch.compiler.is_compiling():
            fall_back("a residual block of diffusers", reason)
        if args or kwargs or reason is not None or (temb is not None and self.time_emb_proj is None):
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[arg-type]  # None is taken
        hidden = self.norm1(input_tensor, activation="silu")
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden, bias = _without_bias(self.conv1, hidden)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)  # type: ignore[union-attr]  # block_reason: there is a projection
            hidden = self.norm2(hidden, input_bias=bias, scale=scale, shift=shift, activation="silu")
        else:
            hidden = self.norm2(hidden, input_bias=bias, emb=temb, activation="silu")
        hidden, bias, follower = self.dropout(hidden), None, follower_of(self)
        if expects_follower(follower):
            hidden, bias = _without_bias(self.conv2, hidden)
        else:
            hidden = self.conv2(hidden)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return join(hidden, input_tensor, 1 / self.output_scale_factor, follower, bias)


class Transformer2DModel(transformer_2d.Transformer2DModel):  # type: ignore[misc]
    """Its images stay in channels_last on the way in and out, and the join brings the next block's norm along."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        def image(tokens: Tensor) -> Tensor:
            x = tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
            # diffusers' own makes it contiguous whatever the network's format is
            return x if residual.is_contiguous(memory_format=torch.channels_last) else x.contiguous()

        if self.use_linear_projection:
            return join(image(self.proj_out(hidden_states)), residual, 1.0, follower_of(self))
        return join(self.proj_out(image(hidden_states)), residual, 1.0, follower_of(self))


# ---- which module can become ours ----

_NOT_SILU = Reason("its activation is not SiLU")
_NORM = Reason("its norms are not plain group norms")
_TIME = Reason("its time embedding enters in another way than by sum or by scale and shift")
_WATCHED = Reason("a hook or another forward on its norm or activation has to see that step alone", "remove it")
_CHANGED = Reason("diffusers' class does not look as in the tested versions", "install a tested version")


def resnet_reason(block: nn.Module) -> Reason | None:
    """None where the block can be a `ResnetBlock2D` of ours."""
    needed: tuple[str, ...] = ("norm1", "norm2", "conv1", "conv2", "dropout", "nonlinearity", "time_emb_proj")
    needed += ("conv_shortcut", "upsample", "downsample", "output_scale_factor", "time_embedding_norm", "skip_time_act")
    if any(not hasattr(block, name) for name in needed):
        return _CHANGED
    # autoencoders say "group", and have no time embedding
    if block.time_embedding_norm not in ("default", "scale_shift") and block.time_emb_proj is not None:
        return _TIME
    if any(type(norm) not in (nn.GroupNorm, GroupNorm) for norm in (block.norm1, block.norm2)):
        return _NORM
    return None if type(block.nonlinearity) is nn.SiLU else _NOT_SILU


def block_reason(block: ResnetBlock2D) -> Reason | None:
    """None where this block of ours can make its norms and SiLUs at once now: each may have been replaced since."""
    if not (isinstance(block.norm1, GroupNorm) and isinstance(block.norm2, GroupNorm)):
        return _NORM
    if type(block.nonlinearity) is not nn.SiLU:
        return _NOT_SILU
    if block.time_embedding_norm == "scale_shift" and block.time_emb_proj is None:
        return _TIME
    return None if all(map(unwatched, (block.norm1, block.norm2, block.nonlinearity))) else _WATCHED


def pair_reason(norm: GroupNormSiLU) -> Reason | None:
    """None where this norm can make its SiLU as well now."""
    silu = norm.__dict__.get(ACTIVATION)
    if type(silu) is not SiLU:
        return _NOT_SILU
    return None if unwatched(norm) and unwatched(silu) else _WATCHED


def convolution_reason(convolution: nn.Conv2d) -> Reason | None:
    """None where it can be a `Conv2d` of ours."""
    c = convolution
    plain = c.stride == c.padding == c.dilation == (1, 1) and c.groups == 1 and c.padding_mode == "zeros"
    return None if plain and c.kernel_size == (3, 3) else Reason("the device's own library convolves")


def transformer_reason(transformer: nn.Module) -> Reason | None:
    """None where it can be a `Transformer2DModel` of ours."""
    parents = ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")
    if any(not hasattr(transformer, name) for name in (*parents, "use_linear_projection", "is_input_continuous")):
        return _CHANGED
    return None if transformer.is_input_continuous else Reason("its input is not an image")

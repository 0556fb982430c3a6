"""diffusers' Attention with sign_fast's kernel for what AttnProcessor2_0 and FusedAttnProcessor2_0 compute.

The processor stays where it is and is looked at in every call: one that the user sets later is the one that runs, and
`unet.attn_processors`, slicing, IP-Adapters and `fuse_qkv_projections` work as they do without us.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from torch import Tensor, nn

from ... import functional
from ...kernels.attention.op import supports
from ...kernels.dispatch import Reason, fall_back
from .classes import unwatched
from .joins import join
from .modules import follower_of

_PLAIN = attention_processor.AttnProcessor2_0
_FUSED = attention_processor.FusedAttnProcessor2_0
# what those two read of the module they are given
_READ: tuple[str, ...] = (
    "spatial_norm",
    "group_norm",
    "norm_cross",
    "norm_q",
    "norm_k",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "heads",
)
_READ += ("residual_connection", "rescale_output_factor", "is_cross_attention", "processor")

CROSS = Reason("keys and values are the text's tokens, whose number is another: PyTorch's attention")
# temb is for spatial norms; the others are for IP-Adapters' processors, and diffusers' Attention drops them silently
_UNREAD = frozenset(("temb", "ip_adapter_masks", "ip_hidden_states"))
_MASK = Reason("a mask is given: diffusers' processor")
_KEYWORDS = Reason("cross_attention_kwargs are given, which only diffusers' processors read", "leave them out")
_SPATIAL = Reason("its norm is spatial: diffusers' processor")
_CHANGED = Reason("diffusers' Attention does not look as in the tested versions", "install a tested version")


class Attention(attention_processor.Attention):  # type: ignore[misc]
    """Attention of tokens (B, T, C) or images (B, C, H, W), with its group norm and its join where it has them."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """hidden_states' shape; encoder_hidden_states (B, S, C') or None."""
        reason = self._reason(attention_mask, cross_attention_kwargs)
        if reason is not None:
            if not torch.compiler.is_compiling():
                fall_back("attention of diffusers", reason)
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        residual = hidden_states
        # of an image it is one pass; what watches the norm has to see tokens
        of_image = self.group_norm is not None and hidden_states.ndim == 4 and unwatched(self.group_norm)
        if of_image:
            hidden_states = self.group_norm(hidden_states)
        tokens = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        if self.group_norm is not None and not of_image:
            tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (self._split(t) for t in self._project(tokens, encoder_hidden_states))
        out = attend(q, k, v)
        tokens = out.transpose(1, 2).flatten(2)
        tokens = self.to_out[1](self.to_out[0](tokens))
        if residual.ndim == 4:
            tokens = tokens.transpose(1, 2).reshape(residual.shape)
        if self.residual_connection:
            return join(tokens, residual, 1 / self.rescale_output_factor, follower_of(self))
        return tokens if self.rescale_output_factor == 1 else tokens / self.rescale_output_factor

    def _project(self, tokens: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, ...]:
        others = tokens
        if encoder_hidden_states is not None:
            others = encoder_hidden_states
            if self.norm_cross:
                others = self.norm_encoder_hidden_states(others)
        processor: Any = self.processor
        if type(processor) is not _FUSED:
            return self.to_q(tokens), self.to_k(others), self.to_v(others)
        if encoder_hidden_states is None:
            return tuple(self.to_qkv(tokens).chunk(3, dim=-1))
        return (self.to_q(tokens), *self.to_kv(others).chunk(2, dim=-1))

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, T, heads·d) -> (B, heads, T, d)."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _reason(self, attention_mask: Tensor | None, keywords: dict[str, Any]) -> Reason | None:
        """None where this call is ours."""
        if attention_mask is not None:
            return _MASK
        if not keywords.keys() <= _UNREAD:
            return _KEYWORDS
        return processor_reason(self)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v of (B, heads, T, d) and twice (B, heads, S, d): our kernel where it takes it, or PyTorch's."""
    if q.shape == k.shape and q.dtype == k.dtype == v.dtype and supports(q, q.shape[-1]) is None:
        return functional.attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def processor_reason(attention: Any) -> Reason | None:
    """None where the attention's processor is one whose computation is ours."""
    if attention.spatial_norm is not None:
        return _SPATIAL
    if attention.norm_q is not None or attention.norm_k is not None:
        return Reason("queries or keys are normalised: diffusers' processor")
    kind = type(attention.processor)
    if kind is _PLAIN or kind is _FUSED:
        return None
    return Reason(f"its processor is {kind.__name__}", "set AttnProcessor2_0 where its computation is wanted")


def attention_reason(attention: nn.Module) -> Reason | None:
    """None where it can be an `Attention` of ours."""
    if any(not hasattr(attention, name) for name in _READ):
        return _CHANGED
    reason = processor_reason(attention)
    if reason is None and attention.is_cross_attention and attention.group_norm is None:
        return CROSS
    return reason


def kernel_reason(attention: Any) -> Reason | None:
    """None where the kernel takes its heads' width on a GPU, which is known only once it is called."""
    width = attention.to_k.out_features // attention.heads if hasattr(attention.to_k, "out_features") else 0
    return (
        Reason(f"heads of {width} channels, the kernel takes up to 256: PyTorch's attention") if width > 256 else None
    )

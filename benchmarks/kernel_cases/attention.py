"""Self-attention straight from its projection: as the published networks lay it out, and with q, k, v apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_cases import Case, Direction, Inputs, Outputs
from benchmarks.official_shapes import Attention, calls, latent_attentions, official
from sign_fast import functional
from sign_fast.kernels.attention.op import launches_backward, launches_forward
from sign_fast.kernels.attention.registration import heads_of, split
from sign_fast.kernels.device import Device
from sign_fast.kernels.launch import Launch

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class AttentionCase(Case):
    call: Attention
    operation: ClassVar[str] = "attention"
    activations: ClassVar[frozenset[str]] = frozenset(("q", "k", "v", "out", "dout", "dq", "dk", "dv"))

    @property
    def shape(self) -> str:
        call = self.call
        return f"{call.heads}x{call.dim}x{call.tokens}" + (" interleaved" if call.interleaved else "")

    @property
    def wide(self) -> bool:
        # neighbouring channels of an interleaved projection lie three elements apart
        return not self.call.interleaved and self.call.dim * self.itemsize % 16 == 0

    def _plane(self, channels: int, device: str) -> Tensor:
        width = math.isqrt(self.call.tokens)
        height = self.call.tokens // width
        if height * width != self.call.tokens:
            height, width = self.call.tokens, 1
        t = torch.empty((self.batch, channels, height, width), dtype=self.torch_dtype, device=device)
        return t.contiguous(memory_format=torch.channels_last)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split(qkv, self.call.heads, self.call.interleaved)

    def launches(self, direction: Direction, device: Device) -> list[Launch]:
        channels = self.call.heads * self.call.dim
        q, k, v = self._split(self._plane(3 * channels, "meta"))
        out = heads_of(self._plane(channels, "meta"), self.call.heads)
        training = direction == "backward"
        logsumexp = torch.empty(q.shape[:3], device="meta")
        found = launches_forward(q, k, v, out, logsumexp if training else None, device)
        return found + launches_backward(out, q, k, v, out, logsumexp, q, k, v, device) if training else found

    def inputs(self, device: str) -> Inputs:
        return {"qkv": self._plane(3 * self.call.heads * self.call.dim, device).normal_().requires_grad_()}

    def ours(self, inputs: Inputs) -> Outputs:
        return (functional.projected_attention(inputs["qkv"], self.call.heads, interleaved=self.call.interleaved),)

    def _image(self, a: Tensor, like: Tensor) -> Tensor:
        """(B, heads, T, d) -> (B, heads·d, H, W), channels_last."""
        batch, _, height, width = like.shape
        return a.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)

    def eager(self, inputs: Inputs) -> Outputs:
        q, k, v = self._split(inputs["qkv"])
        logits = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float() / math.sqrt(self.call.dim))
        a = torch.einsum("bhqk,bhkd->bhqd", logits.softmax(dim=-1).to(v.dtype), v)
        return (self._image(a, inputs["qkv"]),)

    def rivals(self) -> dict[str, Callable[[Inputs], Outputs]]:
        def by(backend: SDPBackend) -> Callable[[Inputs], Outputs]:
            def run(inputs: Inputs) -> Outputs:
                q, k, v = self._split(inputs["qkv"])
                if self.call.interleaved:  # they read rows
                    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
                with sdpa_kernel(backend):
                    a = F.scaled_dot_product_attention(q, k, v)
                return (self._image(a, inputs["qkv"]),)

            return run

        return {name: by(backend) for name, backend in BACKENDS.items()}

    def _elements(self) -> int:
        return self.batch * self.call.heads * self.call.tokens * self.call.dim

    def bytes(self, direction: Direction) -> int:
        # forward: q, k, v, out; backward: those and dout, dq, dk, dv
        return (4 if direction == "forward" else 8) * self._elements() * self.itemsize

    def flops(self, direction: Direction) -> int:
        # two products forward, five backward
        return (4 if direction == "forward" else 10) * self._elements() * self.call.tokens


def cases(batches: Sequence[int], dtypes: Sequence[str], every: bool) -> list[Case]:
    found = [form for call in official(Attention) for form in (call, replace(call, interleaved=not call.interleaved))]
    found += latent_attentions() if every else []
    return [AttentionCase(batch, dtype, call) for call in dict.fromkeys(found) for batch in batches for dtype in dtypes]


def small_cases() -> list[Case]:
    return [
        AttentionCase(2, "bfloat16", Attention(2, 64, 64)),
        AttentionCase(1, "bfloat16", Attention(1, 256, 100, False)),
        AttentionCase(1, "float32", Attention(3, 24, 49)),
        AttentionCase(1, "float16", Attention(1, 8, 16, False)),
    ]


def cpu_cases() -> list[Case]:
    found = [call for call in calls("cifar10-uncond-vp") if isinstance(call, Attention)]
    return [AttentionCase(16, "float32", call) for call in sorted(found)]

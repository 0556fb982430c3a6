"""What a text-to-image network is told of its prompts, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextConditioning:
    """Embeddings of B prompts.

    Args:
        states: (B, T, D), the text encoder's hidden states, of two encoders side by side in D.
        pooled: (B, P), of networks that take a pooled embedding too (SDXL), else None.
        time_ids: (B, 6), original size, crop and target size of SDXL, else None.

    Raises:
        ValueError: the numbers of rows differ.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if len({len(t) for t in self.tensors().values()}) != 1:
            shapes = {name: tuple(t.shape) for name, t in self.tensors().items()}
            raise ValueError(f"embeddings must have a row a prompt each, not {shapes}")

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {"states": self.states, "pooled": self.pooled, "time_ids": self.time_ids}
        return {name: t for name, t in named.items() if t is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TextConditioning:
        """The inverse of `tensors`; other names are left aside."""
        return cls(tensors["states"], tensors.get("pooled"), tensors.get("time_ids"))

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor) -> TextConditioning:
        return TextConditioning.of({name: t[rows] for name, t in self.tensors().items()})

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> TextConditioning:
        """On a device, in a dtype."""
        moved = {name: t.to(device, dtype, non_blocking=non_blocking) for name, t in self.tensors().items()}
        return TextConditioning.of(moved)

    def expand(self, rows: int) -> TextConditioning:
        """One prompt's embeddings, rows times, without a copy; B rows stay as they are where B is `rows`."""
        return TextConditioning.of({name: t.expand(rows, *t.shape[1:]) for name, t in self.tensors().items()})

    def where(self, chosen: Tensor, other: TextConditioning) -> TextConditioning:
        """`other`'s rows, (1, …) or (B, …), where chosen (B,) is True; elsewhere these."""
        others = other.tensors()
        return TextConditioning.of(
            {
                name: torch.where(chosen.reshape(-1, *[1] * (t.ndim - 1)), others[name].to(t), t)
                for name, t in self.tensors().items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[TextConditioning]) -> TextConditioning:
        """The rows of all, in order."""
        named = [part.tensors() for part in parts]
        return TextConditioning.of({name: torch.cat([tensors[name] for tensors in named]) for name in named[0]})

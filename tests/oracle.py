"""Rule 1 in one place: how far a kernel may be from float64, and where the Triton kernels can run."""

from __future__ import annotations

import torch
from torch import Tensor

from sign_fast.kernels.device import interpreting

# the interpreter runs the same kernels on the CPU (TRITON_INTERPRET=1, in a pytest process of its own)
TRITON_DEVICE = "cpu" if interpreting() else "cuda"
RUNS_TRITON = interpreting() or torch.cuda.is_available()


def bound(want: Tensor, plain: Tensor, dtype: torch.dtype, terms: Tensor | None = None) -> Tensor:
    """Twice plain torch's error, and never less than four roundings of the largest value, where plain was lucky.

    Args:
        want: the float64 result.
        plain: what ordinary torch gives in `dtype` on the same input.
        terms: what `want` is a sum of, where it may cancel: its roundings are those of the terms.
    """
    want = want.double().cpu()
    largest = want.abs().max() if terms is None else torch.maximum(want.abs().max(), terms.double().cpu().abs().max())
    return 2 * (plain.double().cpu() - want).abs().max() + 4 * torch.finfo(dtype).eps * largest


def assert_close(got: Tensor, want: Tensor, plain: Tensor, what: str = "", terms: Tensor | None = None) -> None:
    """Assert rule 1 for `got`, in its own dtype; NaN and infinity never pass."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} against {tuple(want.shape)}"
    assert got.isfinite().all() and plain.isfinite().all(), f"{what}: not finite"
    error = (got.double().cpu() - want.double().cpu()).abs().max() if got.numel() else torch.zeros(())
    limit = bound(want, plain, got.dtype, terms) if got.numel() else torch.zeros(())
    assert error <= limit, f"{what}: error {error.item():.3e}, allowed {limit.item():.3e}"

"""The Triton kernels themselves: on a GPU, or interpreted: TRITON_INTERPRET=1 pytest tests/kernels_triton."""

from __future__ import annotations

from tests import oracle

if not oracle.RUNS_TRITON:
    collect_ignore_glob = ["*"]

"""The fill rule, draws and tolerances of tests/golden/README.md, in one place."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def normal(seed: int, *shape: int) -> Tensor:
    """N(seed, *shape) of the golden README."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@cache
def settings(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def filled(seed: int, name: str, p: Tensor) -> Tensor:
    """The value that the fill rule gives parameter `name`."""
    r = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode())).standard_normal(tuple(p.shape))
    if p.ndim > 1:
        r = r / np.sqrt(p[0].numel())
    elif name.endswith(".weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    return torch.from_numpy(r.astype(np.float32)).to(p)


@torch.no_grad()
def fill(net: nn.Module, seed: int) -> nn.Module:
    for name, p in net.named_parameters():
        p.copy_(filled(seed, name, p))
    for name, b in net.named_buffers():
        if name.endswith("freqs"):
            r = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode())).standard_normal(tuple(b.shape))
            b.copy_(torch.from_numpy((16 * r).astype(np.float32)))
    return net


def golden_net(name: str, **overrides: Any) -> nn.Module:
    """The filled network `name` of networks.json, in eval mode."""
    from sign_fast import models

    entry = settings("networks")["nets"][name]
    net = getattr(models, entry["cls"])(**{**entry["kwargs"], **overrides})
    return fill(net, entry["weights_seed"]).eval()


OUTPUT_TOLERANCE = 2e-5  # fp32 on a CPU: max|a − b| ≤ 2e-5·max|b| for outputs …
GRADIENT_TOLERANCE = 2e-4  # … and 2e-4 for gradients and norms (golden README)


def relative_error(got: Any, want: Any) -> float:
    """max|got − want| / max|want|; NaN anywhere is an error of NaN."""
    a, b = (np.asarray(t.detach() if isinstance(t, Tensor) else t, dtype=np.float64) for t in (got, want))
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    return float(np.abs(a - b).max() / np.abs(b).max())

"""How many launches one forward takes on a GPU, counted on the meta device, where nothing runs.

The rule: an ATen operator that computes is one launch, views and allocations are none; a convolution's bias is another
(PyTorch adds it to what cuDNN has made); an operator of `sign_fast` is as many as it has Triton launches on an H100.
What a vendor's library does inside one call, such as changing a layout, nobody sees from outside.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.launch import noting
from ..kernels.operators import on_gpu

_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}


class LaunchCounter(TorchDispatchMode):
    """Counts, while entered, what operators on meta tensors would launch.

    Attributes:
        counts: launches by operator, e.g. "convolution" and "group_norm_silu".
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func.overloadpacket.__name__
        if namespace == "sign_fast":
            return self._ours(name, args)
        result = func(*args, **(kwargs or {}))
        if func.is_view or name in _FREE or not _on_meta(result):
            return result
        self.counts[name] += 1
        if name == "convolution":
            x, weight, bias, *_ = args
            if bias is not None:
                self.counts["add_ (bias)"] += 1
            if torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):
                # cuDNN's rule; the meta device does not know whose convolution it stands for
                result = result.contiguous(memory_format=torch.channels_last)
        return result

    def _ours(self, name: str, args: Any) -> Any:
        # the version for GPUs makes the copies that it would make there, which count as well
        with self, noting() as launches:
            result = on_gpu[name](*args)
        self.counts[name] += len(launches)
        return result


def _on_meta(result: Any) -> bool:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return any(isinstance(t, Tensor) and t.is_meta for t in tensors)


@torch.no_grad()
def launches(net: nn.Module, batch: int = 1, *, dtype: torch.dtype | None = None) -> Counter[str]:
    """Launches of one forward by operator; `.total()` is their number.

    Args:
        net: a preconditioned network, of which only the shapes are used, or what `optimize` returned.
        batch: images.
        dtype: of the inner network; None takes the network's own, float32 where it has none.
    """
    from .optimized import OptimizedNet

    if isinstance(net, OptimizedNet):
        return net.launches(batch)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    tensors = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    size: Any = net.img_resolution
    x = torch.empty((batch, net.img_channels, size, size), device="meta")  # type: ignore[arg-type]
    arguments = (x,) if getattr(net, "time_free", False) else (x, torch.ones((), device="meta"))
    with LaunchCounter() as counter:
        torch.func.functional_call(net, tensors, arguments, {"dtype": dtype} if dtype else {})
    return counter.counts

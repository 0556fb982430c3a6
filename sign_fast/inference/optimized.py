"""`sign_fast.optimize`: a network's copy for inference, folded, frozen and flat."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import SignFastError
from ..models.idempotent import IdempotentPrecond
from ..models.precond import INNER_DTYPES, Precond
from . import reference
from .build import build
from .conditioning import Conditioner, Conditioning
from .fuse import fuse_joins
from .launches import LaunchCounter
from .memory import Release
from .native import native_program, packs

_CACHED_CONDITIONINGS = 64
_CACHED_BYTES = 256 * 2**20


class OptimizedNet(nn.Module):
    """A denoiser for inference, D(x; σ) as `Precond.forward` gives it; made by `optimize`.

    Attributes:
        img_resolution, img_channels, label_dim, sigma_min, sigma_max: as of the network it was made from.
        dtype: of the inner network.
        program: what runs, see `sign_fast.inference.program`.
        native: the program in C++, or None where the extension is missing.
    """

    def __init__(self, net: Precond, dtype: torch.dtype, consume: bool = False, lean: bool = False) -> None:
        super().__init__()
        self._lean = lean
        self.img_resolution = net.img_resolution
        self.img_channels = net.img_channels
        self.label_dim = net.label_dim
        self.sigma_min = net.sigma_min
        self.sigma_max = net.sigma_max
        self.dtype = dtype
        self._shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
        self.conditioner = Conditioner(net, dtype, consume)
        self.program = build(net, dtype, consume=consume)
        for i, constant in enumerate(self.program.constants):
            self.register_buffer(f"constant{i}", constant)
        self._unfused = self.program
        self._meta = tuple(torch.empty_like(constant, device="meta") for constant in self.program.constants)
        if consume:
            Release()(*net.parameters())
        self.requires_grad_(False).eval()
        self.register_load_state_dict_post_hook(_loaded)
        self._start()

    def _start(self) -> None:
        """What is made from the constants, wherever they are now."""
        constants = tuple(self.get_buffer(f"constant{i}") for i in range(len(self._unfused.constants)))
        self._unfused = replace(self._unfused, constants=constants)
        self.program = fuse_joins(self._unfused) if self.device.type == "cuda" else self._unfused
        self.native: Any | None = native_program(self.program, self.device, self.dtype, self._lean)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[float, ...], Conditioning] = OrderedDict()
        self._live: WeakSet[Conditioning] = WeakSet()

    @property
    def device(self) -> torch.device:
        return self.conditioner.device

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level the network knows; the identity but for iDDPM."""
        return self.conditioner.precond.round_sigma(sigma)

    # ---- conditioning ----

    def conditioning(self, levels: tuple[float, ...]) -> Conditioning:
        """Noise embedding and affines of fixed noise levels, computed once; the most recently used ones are kept.

        Args:
            levels: noise levels σ.
        """
        with self._lock:
            found = self._cache.get(levels)
            if found is None:
                found = self._cache[levels] = Conditioning(self.conditioner, levels)
                self._live.add(found)
            self._cache.move_to_end(levels)
            while len(self._cache) > 1 and (
                len(self._cache) > _CACHED_CONDITIONINGS or sum(c.nbytes for c in self._cache.values()) > _CACHED_BYTES
            ):
                self._cache.popitem(last=False)
            return found

    def _condition(self, sigma: Tensor | float, labels: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        """(c_skip, c_out, c_in) of one value or one an image each, and conditioning rows."""
        fixed = not isinstance(sigma, Tensor) or (sigma.numel() == 1 and sigma.device.type == "cpu")
        if fixed:
            # float32 first: the level that the plain network would see
            level = float(torch.as_tensor(sigma).to(self.conditioner.wide))
            found = self.conditioning((level,))
            rows = found.rows(0) if labels is None else self.conditioner.rows(found.c_noise, labels)
            return (*found.device_coefficients[0].split(1), rows)
        sigma = torch.as_tensor(sigma, device=like.device).to(like.dtype).reshape(-1)
        *coefficients, c_noise = self.conditioner.coefficients(sigma)
        return (*coefficients, self.conditioner.rows(c_noise, labels))

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """All that a forward reads besides its arguments, always in one order."""
        return (*self.program.constants, self.conditioner.weight, self.conditioner.bias)

    @property
    def nbytes(self) -> int:
        """Memory of the weights, and on the CPU of what the C++ program keeps: packed weights, its last run's arena."""
        kept = 0 if self.native is None else self.native.bytes
        return kept + sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def conditioning_bytes(self) -> int:
        """Memory of the conditioning that is kept, see `conditioning`."""
        with self._lock:
            return sum(c.nbytes for c in self._cache.values())

    # ---- the network ----

    def denoise(self, x: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
        """D = c_skip·x + c_out·F(c_in·x) with what depends on noise level and class at hand.

        Args:
            x: (B, img_channels, H, W), any floating dtype; cast to float32.
            rows: (B or 1, width), of `conditioning(levels).rows`.
            coefficients: (3,) c_skip, c_out, c_in on the device.
        """
        if self.native is not None:
            return self.native.denoise(x, rows, coefficients)  # type: ignore[no-any-return]
        x = x.to(self.conditioner.wide)
        c_skip, c_out, c_in = coefficients.reshape(3, 1, 1, 1, 1)
        return functional.precondition(x, self.run(_scaled(x, c_in, self.dtype), rows), c_skip, c_out)

    def run(self, x: Tensor, rows: Tensor) -> Tensor:
        """The inner network: x (B, img_channels, H, W) in `dtype`, conditioning rows (B or 1, width) -> x's shape."""
        if self.native is not None:
            return self.native.run(x, rows)  # type: ignore[no-any-return]
        return reference.run(self.program, x, rows)

    def _denoise(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise SignFastError(
                "an optimized network gives no gradients: call it under torch.no_grad(), or the original"
            )
        with torch.no_grad():
            x = x.to(self.conditioner.wide)
            labels = self.conditioner.labels(class_labels, x)
            c_skip, c_out, c_in, rows = self._condition(sigma, labels, x)
            f = self.run(_scaled(x, c_in.reshape(-1, 1, 1, 1), self.dtype), rows)
            return functional.precondition(x, f, c_skip.reshape(-1, 1, 1, 1), c_out.reshape(-1, 1, 1, 1))

    def forward(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, **unsupported: Any
    ) -> Tensor:
        """The denoiser D(x; σ).

        Args:
            x: (B, img_channels, H, W), any floating dtype; cast to float32.
            sigma: noise level, a scalar or B values; a number or a CPU tensor of one value is looked up.
            class_labels: (B, label_dim) or (1, label_dim); None means zeros where label_dim > 0.

        Returns:
            (B, img_channels, H, W) float32 (float64 for a float64 network, for checks).

        Raises:
            SignFastError: gradients are wanted, or an argument that only the original network takes is given.
            ValueError: class_labels do not fit label_dim.
        """
        _refuse(unsupported)
        return self._denoise(x, sigma, class_labels)

    def launches(self, batch: int = 1) -> Counter[str]:
        """Device launches of one forward by operator, noise level fixed; see `sign_fast.inference.launches`."""
        program = fuse_joins(self._unfused)
        program = replace(program, constants=self._meta)
        x = torch.empty((batch, self.img_channels, self.img_resolution, self.img_resolution), device="meta")
        rows, coefficient = torch.empty((1, program.width), device="meta"), torch.empty((1, 1, 1, 1), device="meta")
        with LaunchCounter() as counter:
            f = reference.run(program, _scaled(x, coefficient, self.dtype), rows)
            functional.precondition(x, f, coefficient, coefficient)
        return counter.counts

    # ---- changes of the constants ----

    @torch.no_grad()
    def update(self, net: Precond) -> None:
        """Take the weights of the network this one was made from, further trained, in place: CUDA graphs stay valid.

        Args:
            net: of the same structure as the one given to `optimize`.

        Raises:
            SignFastError: its parameters have other names or shapes.
        """
        if {name: tuple(p.shape) for name, p in net.state_dict().items()} != self._shapes:
            raise SignFastError("update takes a network of the same structure: for another one call optimize again")
        self.conditioner.update(net)
        if self._packed:
            self._unfused = build(net, self.dtype)
            self.program = self._unfused
        else:
            build(net, self.dtype, into=self.program.constants)
        self._refresh()

    def _refresh(self) -> None:
        """What was computed from the constants, after they changed in place."""
        for conditioning in self._live:
            conditioning.refresh()
        self.native = native_program(self.program, self.device, self.dtype, self._lean)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedNet:
        """`to` and its like: another device is fine, another dtype would round what has been folded."""
        self._refuse_lean("moved")
        if fn(self.conditioner.bias).dtype != self.conditioner.bias.dtype:
            raise SignFastError("an optimized network keeps its dtype: call optimize(net, dtype) for another")
        super()._apply(fn, recurse)
        self._start()
        return self

    @property
    def _packed(self) -> bool:
        """Whether the weights are in the C++ program only."""
        return self._lean and packs(self.device, self.dtype)

    def _refuse_lean(self, what: str) -> None:
        if self._packed:
            raise SignFastError(f"a lean network cannot be {what}: optimize the original again, without lean")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; a lean network on the CPU takes none, only `update`."""
        self._refuse_lean("loaded into")
        return super().load_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; a lean network on the CPU has none."""
        self._refuse_lean("saved")
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_lean("loaded")
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_lean("copied")
        made_by_start = ("native", "_lock", "_cache", "_live")
        return {name: value for name, value in self.__dict__.items() if name not in made_by_start}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


class OptimizedIdempotentNet(OptimizedNet):
    """The time-free student f(u) for inference; made by `optimize` from an `IdempotentPrecond`."""

    time_free = True

    def __init__(self, net: IdempotentPrecond, dtype: torch.dtype, consume: bool = False, lean: bool = False) -> None:
        super().__init__(net, dtype, consume, lean)
        self.sigma = net.sigma

    def conditioning(self, levels: tuple[float, ...] = ()) -> Conditioning:
        """Of the one level that the student knows, whatever is asked for."""
        return super().conditioning((self.sigma,))

    def forward(self, u: Tensor, class_labels: Tensor | None = None, **unsupported: Any) -> Tensor:  # type: ignore[override]
        """f(u), float32 of u's shape; arguments and errors as in `OptimizedNet.forward`."""
        _refuse(unsupported)
        return self._denoise(u, self.sigma, class_labels)


def _loaded(net: OptimizedNet, _: object) -> None:
    if all(net.get_buffer(f"constant{i}") is constant for i, constant in enumerate(net._unfused.constants)):
        net._refresh()
    else:  # assign=True put others in their place
        net._start()


def _scaled(x: Tensor, c_in: Tensor, dtype: torch.dtype) -> Tensor:
    """c_in·x in `dtype` and channels_last, in one pass."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    return torch.mul(x, c_in, out=out)


def _refuse(arguments: dict[str, Any]) -> None:
    given = ", ".join(name for name, value in arguments.items() if value is not None and value is not False)
    if given:
        raise SignFastError(f"an optimized network does not take {given}: leave it out, or call the original network")


def optimize(
    net: Precond, dtype: torch.dtype = torch.float32, *, consume: bool = False, lean: bool = False
) -> OptimizedNet:
    """A network's copy for inference: everything that does not depend on the image is computed once.

    Weights in `dtype` (channels_last on CUDA), biases folded into what follows, projections of attention in the order
    q, k, v, the noise embedding and every affine of it computed once a noise level and class, concatenations and
    upsampled skips read in place. Values are those of `net` in eval mode: within 1e-5 in float32.

    Args:
        net: a preconditioned network of `sign_fast.models`, on the device it shall run on; it is not changed.
        dtype: of the inner network: float32, bfloat16 or float16 (float64 for checks).
        consume: free each parameter of `net` as soon as it is folded, so that there are never two copies; `net` cannot
            be used any more.
        lean: keep the weights only as the C++ program has packed them, where it packs them (float32 on a CPU): half the
            memory, but the copy can be neither moved nor copied nor saved.

    Returns:
        D(x; σ) with the call of `Precond.forward`; of an `IdempotentPrecond` f(u).

    Raises:
        TypeError: `net` is something else.
        ValueError: another dtype.
    """
    if not isinstance(net, Precond):
        raise TypeError(f"optimize takes a network of sign_fast.models, such as models.load returns, not {net!r:.60}")
    if dtype not in INNER_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    with torch.inference_mode(False):  # else `update` could not write to it outside of inference mode
        if isinstance(net, IdempotentPrecond):
            return OptimizedIdempotentNet(net, dtype, consume, lean)
        return OptimizedNet(net, dtype, consume, lean)

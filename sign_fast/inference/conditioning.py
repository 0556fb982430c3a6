"""What a network computes from noise level and label alone: the embedding and every affine of it, as one matrix."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.precond import Precond
from .build import affine_columns, wide_dtype
from .memory import Release

_TABLE_BYTES = 64 * 2**20


class Conditioner(nn.Module):
    """The network without its convolutions: noise levels and labels to conditioning rows.

    Args:
        net: parameters are copied, unless `consume` says to take and free them.
        dtype: of the network; the embedding is float32, or float64 with it.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, net: Precond, dtype: torch.dtype, consume: bool = False) -> None:
        super().__init__()
        self.wide = wide_dtype(dtype)
        self.label_dim = net.label_dim
        self.precond = _without_blocks(net, consume)
        columns = affine_columns(net.model)
        width = sum(c.stop - c.start for c in columns.values())
        emb_channels = net.model.map_layer1.out_features
        device = net.model.map_layer1.weight.device
        self.register_buffer("weight", torch.empty(width, emb_channels, dtype=self.wide, device=device))
        self.register_buffer("bias", torch.empty(width, dtype=self.wide, device=device))
        self._fold(net, consume)

    @torch.no_grad()
    def _fold(self, net: Precond, consume: bool = False) -> None:
        """The affines' weights and biases; where the embedding is added, with the bias of the convolution before it."""
        release = Release()
        for block, c in affine_columns(net.model).items():
            affine = block.affine
            assert affine.bias is not None
            bias = affine.bias.detach().double()
            if not block.adaptive_scale and block.conv0.bias is not None:
                bias = bias + block.conv0.bias.detach().double()
            self.weight[c.start : c.stop] = affine.weight.detach()
            self.bias[c.start : c.stop] = bias
            if consume:
                release(affine.weight, affine.bias)

    @torch.no_grad()
    def update(self, net: Precond) -> None:
        """Take the parameters of a further trained network, in place."""
        state = net.state_dict()
        for name, value in self.precond.state_dict().items():
            value.copy_(state[name])
        self._fold(net)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise) as (n,) each, for n noise levels, on sigma's device."""
        return tuple(t.flatten() for t in self.precond.coefficients(sigma.reshape(-1, 1, 1, 1)))  # type: ignore[return-value]

    def labels(self, class_labels: Tensor | None, like: Tensor) -> Tensor | None:
        """(B or 1, label_dim) as the network reads them; None stays None, and is None where there are no classes."""
        return None if class_labels is None else self.precond.labels(class_labels, like.device, like.dtype)

    def embedding(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """c_noise (n,), labels (n or 1, label_dim) or None -> (n, emb_channels), as the network's own `embed`."""
        noise = c_noise.to(self.device, self.wide)
        if self.label_dim and labels is None:
            labels = noise.new_zeros(1, self.label_dim)
        return self.precond.model.embed(noise, None if labels is None else labels.to(self.device, self.wide), None)

    def affines(self, embedding: Tensor) -> Tensor:
        """(…, emb_channels) -> (…, width)."""
        return nn.functional.linear(embedding, self.weight, self.bias)

    def rows(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Conditioning rows (n, width) of n noise labels, or of one for all labels."""
        return self.affines(self.embedding(c_noise, labels))


def _without_blocks(net: Precond, consume: bool) -> Precond:
    """The preconditioner and the embedding layers, of the same classes, frozen; the rest is left out."""
    shell, model = copy.copy(net), copy.copy(net.model)
    embedding = {name: child for name, child in net.model.named_children() if name.startswith("map_")}
    model._modules = dict(embedding)
    model._modules["map_augment"] = None
    shell._modules = {"model": model}
    shell = copy.deepcopy(shell).requires_grad_(False).eval()
    if consume:
        release = Release()
        for layer in embedding.values():
            release(*layer.parameters())
    return shell


class Conditioning:
    """Conditioning of fixed noise levels σ_0 … σ_{n−1}, for every class.

    Args:
        conditioner: of the network.
        levels: the noise levels.

    Attributes:
        coefficients: (n, 3) float32 (float64 for a float64 network) on the CPU, c_skip, c_out and c_in of each level.
        device_coefficients: the same on the device.
        c_noise: (n,) noise labels on the device.
        table: (n, K, width) on the device, K = 1 without classes, else a row a class and, last, one of no class;
            None where it would be larger than 64 MiB and `rows` computes what it is asked for.
    """

    table: Tensor | None

    def __init__(self, conditioner: Conditioner, levels: tuple[float, ...]) -> None:
        self._conditioner = conditioner
        self.levels = levels
        n, classes, width = len(levels), conditioner.label_dim + 1, conditioner.weight.shape[0]
        fits = n * classes * width * conditioner.weight.element_size() <= _TABLE_BYTES
        with torch.inference_mode(False), torch.no_grad():
            self.coefficients, c_noise, embedding = self._compute()
            self.c_noise = c_noise.to(conditioner.device)
            self.device_coefficients = self.coefficients.to(conditioner.device)
            self._held = conditioner.affines(embedding) if fits else embedding
            self.table = self._held if fits else None

    def _compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients (n, 3), noise labels (n,), and the embedding (n, K, emb_channels)."""
        c, n, classes = self._conditioner, len(self.levels), self._conditioner.label_dim + 1
        sigma = torch.tensor(self.levels, dtype=c.wide)
        *coefficients, c_noise = c.coefficients(sigma)
        labels = None
        if c.label_dim:  # the last row of zeros is "no class"
            labels = torch.eye(classes, c.label_dim, dtype=c.wide, device=c.device).repeat(n, 1)
        embedding = c.embedding(c_noise.repeat_interleave(classes), labels)
        return torch.stack(coefficients, dim=1), c_noise, embedding.reshape(n, classes, -1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute anew, in place, from the conditioner's present parameters."""
        *_, embedding = self._compute()
        self._held.copy_(embedding if self.table is None else self._conditioner.affines(embedding))

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return self.held.nbytes

    @property
    def held(self) -> Tensor:
        """The table, or the embedding (n, K, emb_channels) where `affines` are still to be applied to it."""
        return self._held

    @property
    def affines(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Weight (width, emb_channels) and bias (width,) that make rows of what is held; None where it is rows."""
        return (None, None) if self.table is not None else (self._conditioner.weight, self._conditioner.bias)

    def rows(self, level: int, labels: Tensor | None = None) -> Tensor:
        """The conditioning rows of one level.

        Args:
            level: index into the levels.
            labels: (B,) int64 class numbers on the device; None is "no class", which every image shares.

        Returns:
            (B or 1, width); nothing waits for the device.
        """
        return self.rows_of(self.held[level], labels)

    def rows_of(self, held: Tensor, labels: Tensor | None) -> Tensor:
        """`rows` of a level that is held elsewhere (K, …), such as in the inputs of a CUDA graph."""
        chosen = held[-1:] if labels is None else held.index_select(0, labels)
        return chosen if self.table is not None else self._conditioner.affines(chosen)

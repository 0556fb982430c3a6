"""The baseline: a network of the library evaluated with ordinary PyTorch operations, one by one, in NCHW.

F.group_norm, F.silu, convolutions whose weights are cast at each call, depthwise resampling, einsum attention with a
float32 softmax. Where there is a choice the faster form is taken: biases go into F.conv2d. Nothing
of `sign_fast.functional` is called; the topology is read off the given network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(layer: Any, x: Tensor) -> Tensor:
    """A `Conv2d` of the library: resampling, convolution, bias."""
    w = None if layer.weight is None else layer.weight.to(x.dtype)
    b = None if layer.bias is None else layer.bias.to(x.dtype)
    f = None if layer.resample_filter is None else layer.resample_filter.to(x.dtype)
    w_pad = 0 if w is None else w.shape[-1] // 2
    f_pad = 0 if f is None else (f.shape[-1] - 1) // 2
    c = x.shape[1]
    if f is not None and layer.fused_resample and w is not None:
        if layer.up:
            x = F.conv_transpose2d(x, (f * 4).tile([c, 1, 1, 1]), groups=c, stride=2, padding=max(f_pad - w_pad, 0))
            return F.conv2d(x, w, b, padding=max(w_pad - f_pad, 0))
        x = F.conv2d(x, w, padding=w_pad + f_pad)
        x = F.conv2d(x, f.tile([x.shape[1], 1, 1, 1]), groups=x.shape[1], stride=2)
        return x if b is None else x + b.reshape(1, -1, 1, 1)
    if f is not None and layer.up:
        x = F.conv_transpose2d(x, (f * 4).tile([c, 1, 1, 1]), groups=c, stride=2, padding=f_pad)
    elif f is not None:
        x = F.conv2d(x, f.tile([c, 1, 1, 1]), groups=c, stride=2, padding=f_pad)
    return x if w is None else F.conv2d(x, w, b, padding=w_pad)


def norm(layer: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def linear(layer: Any, x: Tensor) -> Tensor:
    y = x @ layer.weight.to(x.dtype).t()
    return y if layer.bias is None else y + layer.bias.to(x.dtype)


def attend(layer: Any, x: Tensor) -> Tensor:
    """Self-attention of a block, softmax in float32."""
    batch, channels, height, width = x.shape
    d = channels // layer.num_heads
    qkv = conv(layer.qkv, norm(layer.norm2, x)).reshape(batch * layer.num_heads, d, 3, height * width)
    q, k, v = qkv.unbind(2)
    logits = torch.einsum("ncq,nck->nqk", q.float(), (k / d**0.5).float())
    a = torch.einsum("nqk,nck->ncq", logits.softmax(dim=2).to(v.dtype), v)
    return conv(layer.proj, a.reshape(batch, channels, height, width))


def block(layer: Any, x: Tensor, emb: Tensor) -> Tensor:
    """A `UNetBlock`."""
    h = conv(layer.conv0, F.silu(norm(layer.norm0, x)))
    p = linear(layer.affine, emb)[:, :, None, None].to(x.dtype)
    if layer.adaptive_scale:
        scale, shift = p.chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, norm(layer.norm1, h), scale + 1))
    else:
        h = F.silu(norm(layer.norm1, h + p))
    h = conv(layer.conv1, F.dropout(h, layer.dropout, layer.training))
    x = h + (x if layer.skip is None else conv(layer.skip, x))
    x = x * layer.skip_scale
    if layer.num_heads:
        x = (attend(layer, x) + x) * layer.skip_scale
    return x


def _position(layer: Any, x: Tensor) -> Tensor:
    if hasattr(layer, "freqs"):
        angle = torch.outer(x, 2 * torch.pi * layer.freqs.to(x.dtype))
    else:
        half = layer.num_channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device) / (half - (1 if layer.endpoint else 0))
        angle = torch.outer(x, ((1 / layer.max_positions) ** steps).to(x.dtype))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def song(net: Any, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
    """`SongUNet`."""
    emb = _position(net.map_noise, noise)
    emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)
    if net.map_label is not None and labels is not None:
        emb = emb + linear(net.map_label, labels * net.map_label.in_features**0.5)
    if net.map_augment is not None and augment is not None:
        emb = emb + linear(net.map_augment, augment)
    emb = F.silu(linear(net.map_layer1, F.silu(linear(net.map_layer0, emb))))

    skips: list[Tensor] = []
    aux = x
    for name, layer in net.enc.items():
        if "aux_down" in name:
            aux = conv(layer, aux)
        elif "aux_skip" in name:
            x = skips[-1] = x + conv(layer, aux)
        elif "aux_residual" in name:
            x = skips[-1] = aux = (x + conv(layer, aux)) / 2**0.5
        else:
            x = conv(layer, x) if name.endswith("_conv") else block(layer, x, emb)
            skips.append(x)
    out = h = None
    for name, layer in net.dec.items():
        if "aux_up" in name:
            out = conv(layer, out)
        elif "aux_norm" in name:
            h = F.silu(norm(layer, x))
        elif "aux_conv" in name:
            assert h is not None
            out = conv(layer, h) if out is None else conv(layer, h) + out
        else:
            x = block(layer, torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
    assert out is not None
    return out


def dhariwal(net: Any, x: Tensor, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
    """`DhariwalUNet`."""
    emb = _position(net.map_noise, noise)
    if net.map_augment is not None and augment is not None:
        emb = emb + linear(net.map_augment, augment)
    emb = linear(net.map_layer1, F.silu(linear(net.map_layer0, emb)))
    if net.map_label is not None and labels is not None:
        emb = emb + linear(net.map_label, labels)
    emb = F.silu(emb)
    skips: list[Tensor] = []
    for name, layer in net.enc.items():
        x = conv(layer, x) if name.endswith("_conv") else block(layer, x, emb)
        skips.append(x)
    for name, layer in net.dec.items():
        x = block(layer, torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
    return conv(net.out_conv, F.silu(norm(net.out_norm, x)))


class Plain(nn.Module):
    """A preconditioned network of `sign_fast.models`, evaluated plainly.

    Args:
        net: shared, not copied; its weights are to be in NCHW, as `models.create` and `models.load` make them.
        dtype: of the inner network.
    """

    def __init__(self, net: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype
        self.inner = song if type(net.model).__name__ == "SongUNet" else dhariwal
        self.label_dim = net.label_dim
        self.img_channels, self.img_resolution = net.img_channels, net.img_resolution
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.net.round_sigma(sigma)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Any = None) -> Tensor:
        """D(x; σ), as the library's own forward."""
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            labels = None
        elif labels is None:
            labels = torch.zeros([1, self.label_dim], device=x.device)
        c_skip, c_out, c_in, c_noise = self.net.coefficients(sigma)
        f = self.inner(self.net.model, (c_in * x).to(self.dtype), c_noise.flatten(), labels, augment_labels)
        return c_skip * x + c_out * f[:, : self.img_channels].to(torch.float32)

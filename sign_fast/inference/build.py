"""From a network of `sign_fast.models` to its `Program`: topology laid out flat, constants folded in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.precond import Precond
from ..models.unet_block import UNetBlock
from ..models.unets import DhariwalUNet, SongUNet
from ..nn import Conv2d, GroupNorm
from .memory import Release
from .program import Attention, Buffer, Columns, Convolution, Filter, Norm, Operation, Program, Resampling


def affine_columns(model: SongUNet | DhariwalUNet) -> dict[UNetBlock, Columns]:
    """Where each block's affine stands in the conditioning rows: one after the other, in the order of execution."""
    columns, start = {}, 0
    for block in model.modules():
        if isinstance(block, UNetBlock):
            columns[block] = Columns(start, start + block.affine.out_features)
            start += block.affine.out_features
    return columns


def build(net: Precond, dtype: torch.dtype, *, into: Sequence[Tensor] | None = None, consume: bool = False) -> Program:
    """The inner network as a `Program`, in eval mode.

    What is folded: the bias of a block's first convolution into the norm after it (into the affine's bias where that
    is added there, see `conditioning`); the bias of a 1×1 skip into that of the convolution it is added to; of
    attention's projection the bias of k, which no softmax sees, away and the bias of v through the output projection;
    the bias of a block's output, where no `JoinNorm` can take it, into all that read it; √½ there into the weight.

    Args:
        net: on any device, meta too; not changed, but by `consume`.
        dtype: of the convolutions' weights; norms and biases are float32 (float64 if dtype is).
        into: constants of an earlier build of the same structure, filled anew in place instead of made.
        consume: free each parameter as soon as it is folded.

    Returns:
        The program; its output is (B, img_channels, H, W), without the network's further channels.
    """
    builder = _Builder(net, dtype, into, consume)
    output = builder.song(net.model) if isinstance(net.model, SongUNet) else builder.dhariwal(net.model)
    width = sum(c.stop - c.start for c in builder.columns.values())
    return Program(tuple(builder.operations), tuple(builder.buffers), tuple(builder.constants), output, width)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of norms, biases and the embedding, where convolutions are in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Builder:
    def __init__(self, net: Precond, dtype: torch.dtype, into: Sequence[Tensor] | None, consume: bool) -> None:
        size = net.img_resolution
        self.channels = net.img_channels
        self.dtype = dtype
        self.wide = wide_dtype(dtype)
        self.into = into
        self.consume = consume
        self.release = Release()
        self.columns = affine_columns(net.model)
        self.buffers = [Buffer(net.img_channels, size, size)]
        self.operations: list[Operation] = []
        self.constants: list[Tensor] = []
        # what is still to be added to a buffer's channels by those who read it, float64
        self.offsets: dict[int, Tensor] = {}

    # ---- constants ----

    def constant(self, value: Tensor, dtype: torch.dtype) -> int:
        index = len(self.constants)
        value = value.detach()
        if self.into is not None:
            self.into[index].copy_(value)
            self.constants.append(self.into[index])
            return index
        last = value.ndim == 4 and (value.is_cuda or dtype.itemsize == 2)
        layout = torch.channels_last if last else torch.contiguous_format
        # without `consume` a copy always: the constants are nobody else's
        made = value.to(dtype, memory_format=layout, copy=not self.consume)
        self.constants.append(made.contiguous(memory_format=layout))
        return index

    def bias(self, *terms: Tensor | None) -> int | None:
        """The sum of vectors as a constant; None where there are none."""
        total = _sum(*terms)
        return None if total is None else self.constant(total, self.wide)

    def offset(self, inputs: tuple[int, ...]) -> Tensor | None:
        """Of the concatenation of buffers; None where nothing is to be added."""
        if not any(i in self.offsets for i in inputs):
            return None
        device = next(iter(self.offsets.values())).device
        zeros = (torch.zeros(self.buffers[i].channels, dtype=torch.float64, device=device) for i in inputs)
        return torch.cat([self.offsets.get(i, zero) for i, zero in zip(inputs, zeros, strict=True)])

    def done(self, *modules: nn.Module | None) -> None:
        """The parameters of these modules are folded."""
        if self.consume:
            self.release(*(p for m in modules if m is not None for p in m.parameters(recurse=False)))

    # ---- operations ----

    def buffer(self, channels: int, height: int, width: int) -> int:
        self.buffers.append(Buffer(channels, height, width))
        return len(self.buffers) - 1

    def norm(
        self,
        inputs: tuple[int, ...],
        layer: GroupNorm,
        *,
        silu: bool = True,
        input_bias: Tensor | None = None,
        emb: Columns | None = None,
        scale: Columns | None = None,
        shift: Columns | None = None,
    ) -> int:
        added = self.bias(input_bias, self.offset(inputs))
        first = self.buffers[inputs[0]]
        output = self.buffer(sum(self.buffers[i].channels for i in inputs), first.height, first.width)
        weight, bias = self.constant(layer.weight, self.wide), self.constant(layer.bias, self.wide)
        self.done(layer)
        self.operations.append(
            Norm(inputs, output, layer.num_groups, layer.eps, weight, bias, added, emb, scale, shift, silu)
        )
        return output

    def convolution(
        self,
        inputs: tuple[int, ...],
        weight: Tensor,
        bias: int | None = None,
        *,
        padding: int | None = None,
        resampling: Resampling = "none",
        residual: int | None = None,
        residual_up: bool = False,
        residual_scale: float = 1.0,
        scale: float = 1.0,
    ) -> int:
        """Of a weight (C_out, C_in, k, k); padding None keeps height and width."""
        first, kernel = self.buffers[inputs[0]], weight.shape[-1]
        padding = kernel // 2 if padding is None else padding
        grown = 2 * padding - kernel + 1
        height, width = (
            (n * 2 if resampling == "up" else n // 2 if resampling == "down" else n) + grown
            for n in (first.height, first.width)
        )
        output = self.buffer(weight.shape[0], height, width)
        index = self.constant(weight, self.dtype)
        self.operations.append(
            Convolution(inputs, output, index, bias, padding, resampling, residual, residual_up, residual_scale, scale)
        )
        return output

    def filter(
        self,
        source: int,
        layer: Conv2d,
        padding: int,
        bias: int | None = None,
        residual: int | None = None,
        scale: float = 1.0,
    ) -> int:
        """The layer's resampling filter alone, a transposed convolution with gain 4 for `up`."""
        assert layer.resample_filter is not None
        taps = layer.resample_filter[0, 0]
        size, old = taps.shape[-1], self.buffers[source]
        if layer.up:
            height, width = (2 * (n - 1) + size - 2 * padding for n in (old.height, old.width))
        else:
            height, width = ((n + 2 * padding - size) // 2 + 1 for n in (old.height, old.width))
        output = self.buffer(old.channels, height, width)
        index = self.constant(taps * 4 if layer.up else taps, self.dtype)
        self.operations.append(Filter(source, output, index, layer.up, padding, bias, residual, scale))
        return output

    def layer(
        self,
        inputs: tuple[int, ...],
        layer: Conv2d,
        bias: Tensor | None,
        *,
        rows: int | None = None,
        residual: int | None = None,
        residual_up: bool = False,
        scale: float = 1.0,
        defer: bool = False,
    ) -> int:
        """A `Conv2d` with a kernel, resampling included.

        Args:
            bias: of the sum, which is not always the layer's own.
            rows: keep this many outputs.
            defer: leave the bias to those who read the output, and put `scale` into the weight.
        """
        assert layer.weight is not None
        weight = layer.weight.detach() if rows is None else layer.weight.detach()[:rows]
        w_pad, f_pad = weight.shape[-1] // 2, _f_pad(layer)
        if residual is not None and residual in self.offsets:
            bias = _sum(bias, self.offsets[residual])
        if layer.down and layer.fused_resample:
            wide = self.convolution((self.joined(inputs),), weight, padding=w_pad + f_pad)
            output = self.filter(wide, layer, 0, self.bias(bias), residual, scale)
            self.done(layer)
            return output
        resampling, padding = _resampling(layer), w_pad
        if resampling != "none" and not layer.box:
            fused = layer.up and layer.fused_resample
            inputs = (self.filter(self.joined(inputs), layer, max(f_pad - w_pad, 0) if fused else f_pad),)
            resampling, padding = "none", max(w_pad - f_pad, 0) if fused else w_pad
        elif self.offset(inputs) is not None:
            inputs = (self.joined(inputs),)
        sums: dict[str, Any] = {"residual": residual, "residual_up": residual_up}
        if defer:
            sums["residual_scale"] = scale
            weight = weight.double() * scale
        else:
            sums["scale"] = scale
        index = None if defer else self.bias(bias)
        output = self.convolution(inputs, weight, index, padding=padding, resampling=resampling, **sums)
        if defer and bias is not None:
            self.offsets[output] = bias.detach().double() * scale
        self.done(layer)
        return output

    def joined(self, inputs: tuple[int, ...]) -> int:
        """One buffer with the concatenation and nothing to be added, by a 1×1 convolution with the identity.

        Only unusual networks need it.
        """
        offset = self.offset(inputs)
        if len(inputs) == 1 and offset is None:
            return inputs[0]
        channels = sum(self.buffers[i].channels for i in inputs)
        identity = torch.eye(channels, device=self.constants[0].device)[:, :, None, None]
        return self.convolution(inputs, identity, self.bias(offset))

    # ---- networks ----

    def block(self, inputs: tuple[int, ...], block: UNetBlock, defer: bool = False) -> int:
        """`defer`: what reads the output next is no norm of it alone, which could be a `JoinNorm`."""
        columns, conv0 = self.columns[block], block.conv0
        conv0_bias = None if conv0.bias is None else conv0.bias.detach()
        h = self.layer((self.norm(inputs, block.norm0),), conv0, None)
        if block.adaptive_scale:
            middle = (columns.start + columns.stop) // 2
            first, second = Columns(columns.start, middle), Columns(middle, columns.stop)
            h = self.norm((h,), block.norm1, input_bias=conv0_bias, scale=first, shift=second)
        else:  # the columns come with conv0's bias, see `conditioning`
            h = self.norm((h,), block.norm1, emb=columns)
        skip, scale = block.skip, float(block.skip_scale)
        plain = defer and not block.num_heads
        if plain and skip is not None and skip.weight is not None and _resampling(skip) == "none":
            # the skip's products are added to what conv1 has made, which needs no buffer for them and no sum
            h = self.layer((h,), block.conv1, block.conv1.bias, scale=scale, defer=True)
            return self.deferred_skip(inputs, skip, h, scale)
        residual, residual_up, skip_bias = self.skip(inputs, skip)
        bias = _sum(block.conv1.bias, skip_bias)
        h = self.layer((h,), block.conv1, bias, residual=residual, residual_up=residual_up, scale=scale, defer=plain)
        self.done(skip)
        return self.attention(h, block, defer) if block.num_heads else h

    def deferred_skip(self, inputs: tuple[int, ...], layer: Conv2d, h: int, scale: float) -> int:
        """h + scale·(1×1 convolution of the inputs), its bias deferred."""
        assert layer.weight is not None
        bias, offset = layer.bias, self.offset(inputs)
        if offset is not None:
            bias = _sum(bias, layer.weight.detach().double().flatten(1) @ offset)
        output = self.convolution(inputs, layer.weight.detach().double() * scale, residual=h)
        total = _sum(self.offsets.get(h), None if bias is None else bias.detach().double() * scale)
        if total is not None:
            self.offsets[output] = total
        self.done(layer)
        return output

    def skip(self, inputs: tuple[int, ...], layer: Conv2d | None) -> tuple[int, bool, Tensor | None]:
        """(residual, whether it is read upsampled, bias that is still to be added) of a block's skip."""
        if layer is None:
            return inputs[0] if len(inputs) == 1 else self.joined(inputs), False, None
        if _resampling(layer) != "none" and not (layer.box and layer.weight is not None):
            inputs = (self.joined(inputs),)
            if layer.down:
                inputs = (self.filter(inputs[0], layer, _f_pad(layer)),)
        source, bias = inputs[0], layer.bias
        if layer.weight is not None:  # a 1×1 convolution and upsampling commute, and the convolution is cheaper first
            offset = self.offset(inputs)
            if offset is not None:
                bias = _sum(bias, layer.weight.detach().double().flatten(1) @ offset)
            resampling: Resampling = "down" if layer.down and layer.box else "none"
            source = self.convolution(inputs, layer.weight, resampling=resampling)
        if layer.up and not layer.box:
            return self.filter(source, layer, _f_pad(layer)), False, bias
        return source, layer.up, bias

    def attention(self, h: int, block: UNetBlock, defer: bool) -> int:
        qkv, proj = block.qkv, block.proj
        assert qkv.weight is not None and proj.weight is not None
        channels = block.out_channels
        normed = self.norm((h,), block.norm2, silu=False)
        weight = qkv.weight.reshape(channels, 3, channels).transpose(0, 1).reshape(3 * channels, channels, 1, 1)
        bias, moved = None, None
        if qkv.bias is not None:
            q, _, v = qkv.bias.detach().double().reshape(channels, 3).unbind(1)
            # in the weight's dtype: a product of matrices takes no other along
            bias = self.constant(torch.cat([q, torch.zeros_like(q), torch.zeros_like(q)]), self.dtype)
            moved = proj.weight.detach().double().flatten(1) @ v
        source = self.convolution((normed,), weight, bias)
        self.done(qkv)
        mixed = self.buffer(channels, self.buffers[h].height, self.buffers[h].width)
        self.operations.append(Attention(source, mixed, block.num_heads))
        return self.layer(
            (mixed,), proj, _sum(proj.bias, moved), residual=h, scale=float(block.skip_scale), defer=defer
        )

    def song(self, model: SongUNet) -> int:
        skips: list[int] = []
        x = aux = 0
        for (name, layer), following in zip(model.enc.items(), _following(model.enc), strict=True):
            if isinstance(layer, UNetBlock):
                x = self.block((x,), layer, defer="_aux" in following)
                skips.append(x)
                continue
            assert isinstance(layer, Conv2d)
            if "_aux_down" in name:
                aux = self.filter(aux, layer, _f_pad(layer))
            elif "_aux_skip" in name:
                x = skips[-1] = self.layer((aux,), layer, layer.bias, residual=x)
            elif "_aux_residual" in name:
                x = skips[-1] = aux = self.layer((aux,), layer, layer.bias, residual=x, scale=0.5**0.5)
            else:
                x = self.layer((x,), layer, layer.bias, defer=True)
                skips.append(x)

        out: int | None = None
        up: Conv2d | None = None
        normed = x
        for (name, layer), following in zip(model.dec.items(), _following(model.dec), strict=True):
            if isinstance(layer, UNetBlock):
                x = self.block((x, skips.pop()) if "_block" in name else (x,), layer, defer="_block" in following)
            elif isinstance(layer, GroupNorm):
                normed = self.norm((x,), layer)
            elif "_aux_up" in name:
                assert isinstance(layer, Conv2d)
                up = layer
            else:
                assert isinstance(layer, Conv2d)
                if out is not None and up is not None and not up.box:
                    out = self.filter(out, up, _f_pad(up))
                out = self.last((normed,), layer, out, up is not None and up.box)
        assert out is not None
        return out

    def dhariwal(self, model: DhariwalUNet) -> int:
        skips: list[int] = []
        x = 0
        for layer in model.enc.values():
            if isinstance(layer, UNetBlock):
                x = self.block((x,), layer)
            else:
                assert isinstance(layer, Conv2d)
                x = self.layer((x,), layer, layer.bias, defer=True)
            skips.append(x)
        for (name, layer), following in zip(model.dec.items(), _following(model.dec), strict=True):
            assert isinstance(layer, UNetBlock)
            x = self.block((x, skips.pop()) if "_block" in name else (x,), layer, defer="_block" in following)
        return self.last((self.norm((x,), model.out_norm),), model.out_conv, None, False)

    def last(self, inputs: tuple[int, ...], layer: Conv2d, residual: int | None, residual_up: bool) -> int:
        """A convolution that makes outputs of the network, of which the image's channels are wanted."""
        bias = None if layer.bias is None else layer.bias[: self.channels]
        return self.layer(inputs, layer, bias, rows=self.channels, residual=residual, residual_up=residual_up)


def _following(layers: nn.ModuleDict) -> list[str]:
    """The name after each name."""
    return [*list(layers)[1:], ""]


def _resampling(layer: Conv2d) -> Resampling:
    return "up" if layer.up else "down" if layer.down else "none"


def _f_pad(layer: Conv2d) -> int:
    return 0 if layer.resample_filter is None else (layer.resample_filter.shape[-1] - 1) // 2


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Of vectors, in float64; None where there are none."""
    given = [t.detach().double() for t in terms if t is not None]
    return sum(given[1:], given[0]) if given else None

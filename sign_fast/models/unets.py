"""The two published U-Nets: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding
from .unet_block import UNetBlock

EncoderOutput = Literal["also", "only"]
"""Whether a network returns its encoder's last output beside its own, or alone."""


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_encoder(encoder: str | None) -> None:
    if encoder is not None:
        _choice("encoder", encoder, ("also", "only"))


def _drop_labels(labels: Tensor, probability: float, training: bool) -> Tensor:
    if not (training and probability):
        return labels
    return labels * (torch.rand([labels.shape[0], 1], device=labels.device) >= probability).to(labels.dtype)


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ (Song et al. 2021), with EDM's names and arguments.

    Args:
        img_resolution: H = W of the images.
        in_channels, out_channels: C of input and output.
        label_dim: number of classes, 0 for none; labels are (B, label_dim).
        augment_dim: width of the augmentation labels, 0 for none.
        model_channels, channel_mult: channels at level l are model_channels·channel_mult[l], at img_resolution >> l.
        channel_mult_emb, channel_mult_noise: widths of the embedding and of the noise features over model_channels.
        num_blocks: residual blocks a level.
        attn_resolutions: resolutions with self-attention.
        dropout: of the blocks. label_dropout: of the labels, in training.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder_type: "standard", "skip" or "residual"; decoder_type: "standard" or "skip".
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).

    Raises:
        ValueError: an unknown embedding, encoder or decoder type.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        _choice("embedding_type", embedding_type, ("positional", "fourier"))
        _choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _choice("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init: dict[str, Any] = {"init_mode": "xavier_uniform"}
        init_zero: dict[str, Any] = {"init_mode": "xavier_uniform", "init_weight": 1e-5}
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "num_heads": 1,
            "dropout": dropout,
            "skip_scale": 0.5**0.5,
            "eps": 1e-6,
            "resample_filter": resample_filter,
            "resample_proj": True,
            "adaptive_scale": False,
            "init": init,
            "init_zero": init_zero,
            "init_attn": {"init_mode": "xavier_uniform", "init_weight": 0.2**0.5},
        }

        self.map_noise: PositionalEmbedding | FourierEmbedding
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        self.enc = nn.ModuleDict()
        cout = in_channels
        caux = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                cin, cout = cout, model_channels
                self.enc[f"{res}x{res}_conv"] = Conv2d(cin, cout, kernel=3, **init)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(cout, cout, down=True, **block)
                if encoder_type == "skip":
                    down = Conv2d(caux, caux, kernel=0, down=True, resample_filter=resample_filter)
                    self.enc[f"{res}x{res}_aux_down"] = down
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(caux, cout, kernel=1, **init)
                if encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        caux, cout, kernel=3, down=True, resample_filter=resample_filter, fused_resample=True, **init
                    )
                    caux = cout
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(cin, cout, attention=res in attn_resolutions, **block)
        skips: list[Any] = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(cout, cout, attention=True, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(cout, cout, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(cout, cout, up=True, **block)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attn = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(cin, cout, attention=attn, **block)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(channel_mult) - 1:
                    up = Conv2d(out_channels, out_channels, kernel=0, up=True, resample_filter=resample_filter)
                    self.dec[f"{res}x{res}_aux_up"] = up
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(cout, eps=1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(cout, out_channels, kernel=3, **init_zero)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """(B,) noise labels, (B or 1, label_dim) and (B, augment_dim) labels -> (B, emb_channels)."""
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)  # [sin, cos]
        if self.map_label is not None and class_labels is not None:
            labels = _drop_labels(class_labels, self.label_dropout, self.training)
            emb = emb + self.map_label(labels * self.map_label.in_features**0.5)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        encoder: EncoderOutput | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, in_channels, H, W), noise_labels (B,) -> (B, out_channels, H, W) in x's dtype.

        With encoder "also" the pair of it and h (B, C, H', W'), the encoder's last output; with "only" h alone, for
        which the decoder does not run. In one call: wrappers of forward (DDP, FSDP, torch.compile) see all of it.
        """
        _check_encoder(encoder)
        emb = self.embed(noise_labels, class_labels, augment_labels)
        h, skips = self._encode(x, emb)
        if encoder == "only":
            return h
        out = self._decode(h, skips, emb)
        return out if encoder is None else (out, h)

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "_aux_down" in name:
                aux = layer(aux)
            elif "_aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "_aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / 2**0.5
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        out: Tensor | None = None
        normed = x
        for name, layer in self.dec.items():
            if "_aux_up" in name:
                out = layer(out)
            elif "_aux_norm" in name:
                normed = layer(x, activation="silu")
            elif "_aux_conv" in name:
                out = layer(normed) if out is None else out + layer(normed)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        assert out is not None
        return out


class DhariwalUNet(nn.Module):
    """ADM (Dhariwal & Nichol 2021), with EDM's names and arguments.

    Args:
        img_resolution, in_channels, out_channels, label_dim, augment_dim, model_channels, channel_mult,
        channel_mult_emb, num_blocks, attn_resolutions, dropout, label_dropout: as in `SongUNet`.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        third = (1 / 3) ** 0.5
        init: dict[str, Any] = {"init_mode": "kaiming_uniform", "init_weight": third, "init_bias": third}
        init_zero: dict[str, Any] = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "channels_per_head": 64,
            "dropout": dropout,
            "init": init,
            "init_zero": init_zero,
        }

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(
                label_dim, emb_channels, bias=False, init_mode="kaiming_normal", init_weight=label_dim**0.5
            )

        self.enc = nn.ModuleDict()
        cout = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_conv"] = Conv2d(cin, cout, kernel=3, **init)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(cout, cout, down=True, **block)
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(cin, cout, attention=res in attn_resolutions, **block)
        skips: list[Any] = [layer.out_channels for layer in self.enc.values()]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(cout, cout, attention=True, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(cout, cout, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(cout, cout, up=True, **block)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(cin, cout, attention=res in attn_resolutions, **block)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, kernel=3, **init_zero)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """(B,) noise labels, (B or 1, label_dim) and (B, augment_dim) labels -> (B, emb_channels)."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(_drop_labels(class_labels, self.label_dropout, self.training))
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        encoder: EncoderOutput | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `SongUNet.forward`."""
        _check_encoder(encoder)
        emb = self.embed(noise_labels, class_labels, augment_labels)
        h, skips = x, []
        for layer in self.enc.values():
            h = layer(h, emb) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        if encoder == "only":
            return h
        x = h
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        out = self.out_conv(self.out_norm(x, activation="silu"))
        return out if encoder is None else (out, h)

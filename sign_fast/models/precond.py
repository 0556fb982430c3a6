"""The four preconditioners, D(x; σ) = c_skip·x + c_out·F(c_in·x, c_noise, labels) (EDM, eq. 7 and table 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .pretrained import Pretrained
from .unet_block import UNetBlock
from .unets import DhariwalUNet, EncoderOutput, SongUNet

_NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
INNER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Precond(Pretrained, nn.Module):
    """What the four preconditioners share; a subclass gives the coefficients.

    Args:
        img_resolution, img_channels: shape of the images.
        label_dim: number of classes, 0 for none.
        use_fp16: run the inner network in float16, on CUDA only, as published.
        out_channels: outputs of the inner network; the first img_channels are used.
        model_type: "SongUNet" or "DhariwalUNet"; model_kwargs are its arguments.
        dtype: run the inner network in this dtype on any device; goes before use_fp16.

    Raises:
        ValueError: unknown model_type or dtype.
    """

    sigma_min: float
    sigma_max: float

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        out_channels: int,
        model_type: str,
        model_kwargs: dict[str, Any],
        dtype: torch.dtype | None,
    ) -> None:
        if model_type not in _NETWORKS:
            raise ValueError(f"model_type must be one of {', '.join(_NETWORKS)}, not {model_type!r}")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.dtype = _checked(dtype)
        self.model = _NETWORKS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=out_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise) at sigma (B or 1, 1, 1, 1)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        *,
        dtype: torch.dtype | None = None,
        encoder: EncoderOutput | None = None,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The denoiser D(x; σ).

        Args:
            x: (B, img_channels, H, W), any floating dtype; cast to float32.
            sigma: noise level, a scalar or B values.
            class_labels: (B, label_dim) or (1, label_dim); None means zeros where label_dim > 0.
            force_fp32: run the inner network in float32 whatever was asked for elsewhere.
            dtype: the inner network's dtype for this call; None takes the constructor's.
            encoder: "also" returns (D, h) with h (B, C, H', W') the last output of the inner network's encoder, in the
                inner dtype; "only" returns h and saves the decoder.
            model_kwargs: handed to the inner network, e.g. augment_labels (B, augment_dim).

        Returns:
            (B, img_channels, H, W) float32 (float64 if dtype is float64, for checks).

        Raises:
            ValueError: class_labels do not fit label_dim, or dtype or encoder is unknown.
        """
        inner = torch.float32 if force_fp32 else _checked(dtype) or self.dtype
        if inner is None:
            inner = torch.float16 if self.use_fp16 and x.device.type == "cuda" else torch.float32
        outer = torch.float64 if inner == torch.float64 else torch.float32
        x = x.to(outer)
        if isinstance(sigma, (int, float)):  # filled in on the device: a copy from the host would wait for it
            sigma = torch.full((1,), sigma, dtype=torch.float32, device=x.device)
        sigma = torch.as_tensor(sigma, device=x.device).to(outer).reshape(-1, 1, 1, 1)
        labels = self.labels(class_labels, x.device, outer)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        if encoder is not None:  # else the inner network is called as published ones are
            model_kwargs["encoder"] = encoder
        f = self.model((c_in * x).to(inner), c_noise.flatten(), class_labels=labels, **model_kwargs)
        if encoder == "only":
            return f
        f, h = f if encoder == "also" else (f, None)
        denoised = functional.precondition(x, f[:, : self.img_channels], c_skip, c_out)
        return denoised if h is None else (denoised, h)

    def labels(self, class_labels: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """class_labels as the inner network reads them, (B or 1, label_dim): zeros for None, None without classes."""
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros([1, self.label_dim], device=device, dtype=dtype)
        if class_labels.shape[-1] != self.label_dim:
            raise ValueError(
                f"class_labels must be (B, {self.label_dim}) one-hot rows, not {tuple(class_labels.shape)}"
            )
        return class_labels.to(dtype).reshape(-1, self.label_dim)

    def checkpoint_blocks(self, wanted: bool = True) -> None:
        """Whether the backward pass computes each block's activations again, instead of keeping them in memory."""
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.checkpointing = wanted

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level the network knows; the identity but for iDDPM."""
        return torch.as_tensor(sigma)


def _checked(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and dtype not in INNER_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    return dtype


class VPPrecond(Precond):
    """Variance preserving (Song et al. 2021): c_skip 1, c_out −σ, c_in 1/√(σ²+1), c_noise (M−1)·σ⁻¹(σ).

    Args:
        beta_d, beta_min: σ(t) = √(exp(½β_d t² + β_min t) − 1).
        M: number of noise levels the network was trained with.
        epsilon_t: smallest t; sigma_min = σ(epsilon_t), sigma_max = σ(1).
        others: as in `Precond`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        *,
        dtype: torch.dtype | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, img_channels, model_type, model_kwargs, dtype
        )
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.epsilon_t = epsilon_t
        with torch.device("cpu"):  # whatever the default: a network is loaded by way of the meta device
            self.sigma_min = float(self.sigma(epsilon_t))
            self.sigma_max = float(self.sigma(1))

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ(t) = √(exp(½β_d t² + β_min t) − 1)."""
        t = torch.as_tensor(t)
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()

    def sigma_inv(self, sigma: Tensor | float) -> Tensor:
        """The t with σ(t) = sigma."""
        sigma = torch.as_tensor(sigma)
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


class VEPrecond(Precond):
    """Variance exploding (Song et al. 2021): c_skip 1, c_out σ, c_in 1, c_noise ln(σ/2).

    Args:
        sigma_min, sigma_max: range of noise levels.
        others: as in `Precond`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        *,
        dtype: torch.dtype | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, img_channels, model_type, model_kwargs, dtype
        )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log()


class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol & Dhariwal 2021): c_skip 1, c_out −σ, c_in 1/√(σ²+1), c_noise M−1−index of the nearest u.

    Args:
        C_1, C_2: constants of the cosine schedule; ᾱ_j = sin²(π/2·j/(M(1+C_2))).
        M: number of noise levels; buffer u holds M+1 of them, falling to u_M = 0.
        others: as in `Precond`. The network has 2·img_channels outputs (mean and variance); the first half is used.
    """

    u: Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        *,
        dtype: torch.dtype | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, img_channels * 2, model_type, model_kwargs, dtype
        )
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = M
        levels = torch.tensor(iddpm_noise_levels(M, C_1, C_2), dtype=torch.float32, device="cpu")
        self.register_buffer("u", levels.to(torch.get_default_device()))
        self.sigma_min = float(levels[M - 1])
        self.sigma_max = float(levels[0])

    def alpha_bar(self, j: Tensor | float) -> Tensor:
        """ᾱ_j = sin²(π/2·j/(M(1+C_2)))."""
        return (0.5 * math.pi * torch.as_tensor(j) / self.M / (self.C_2 + 1)).sin() ** 2

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_noise = (self.M - 1 - self.round_sigma(sigma, return_index=True)).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def round_sigma(self, sigma: Tensor | float, return_index: bool = False) -> Tensor:
        """The nearest u in sigma's shape, dtype and device, or with return_index its index (int64)."""
        sigma = torch.as_tensor(sigma)
        flat = sigma.to(self.u.device, torch.float32).reshape(-1, 1)
        index = (flat - self.u).abs().argmin(1)
        nearest = index if return_index else self.u[index].to(sigma.dtype)
        return nearest.reshape(sigma.shape).to(sigma.device)


def iddpm_noise_levels(M: int, C_1: float, C_2: float) -> list[float]:
    """u_0 … u_M: u_M = 0, u_{j−1} = √((u_j² + 1)/max(ᾱ_{j−1}/ᾱ_j, C_1) − 1), in float64."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / M / (C_2 + 1)) ** 2

    u = [0.0] * (M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1)
    return u


class EDMPrecond(Precond):
    """EDM (Karras et al. 2022): c_skip s²/(σ²+s²), c_out σs/√(σ²+s²), c_in 1/√(s²+σ²), c_noise ln(σ)/4.

    Args:
        sigma_min, sigma_max: range of noise levels.
        sigma_data: s, the data's standard deviation.
        others: as in `Precond`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        *,
        dtype: torch.dtype | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, img_channels, model_type, model_kwargs, dtype
        )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return edm_coefficients(sigma, self.sigma_data)


def edm_coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EDM's (c_skip, c_out, c_in, c_noise), see `EDMPrecond`."""
    s = sigma_data
    total = sigma**2 + s**2
    return s**2 / total, sigma * s / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4

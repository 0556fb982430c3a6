"""What a text-to-image pipeline consists of, and whether its parts fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor

from ...errors import SignFastError, short
from ...sampling.students import T_INIT
from ...sampling.text import TextConditioning
from .versions import require_diffusers

Prediction: TypeAlias = Literal["epsilon", "v", "flow"]

REQUIRED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
OPTIONAL = ("text_encoder_2", "tokenizer_2")
PARTS = (*REQUIRED, *OPTIONAL)
"""Names of what a pipeline consists of, as in diffusers; the optional ones are SDXL's."""


@dataclass(frozen=True)
class LatentScale:
    """Between the latents of a VAE and those of the network: ((z − shift or mean)/std)·factor, as diffusers has it.

    Args:
        factor: the VAE's scaling_factor.
        shift: its shift_factor.
        mean, std: its latents_mean and latents_std, a number a channel, or None.
    """

    factor: float
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def constants(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(a, b), each (C or 1, 1, 1) float32, with a·z + b the VAE's latents of the network's z."""
        std = torch.tensor(self.std or (1.0,), dtype=torch.float64)
        mean = torch.tensor(self.mean or (self.shift,), dtype=torch.float64)
        a, b = std / self.factor, mean.expand_as(std) if len(mean) == 1 else mean
        return a.float().to(device)[:, None, None], b.float().to(device)[:, None, None]

    def to_vae(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, of the network's latents (B, C, H, W)."""
        a, b = self.constants(latents.device)
        return latents * a.to(latents.dtype) + b.to(latents.dtype)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The network's latents, of what the VAE encoded, (B, C, H, W)."""
        a, b = self.constants(latents.device)
        return (latents - b.to(latents.dtype)) / a.to(latents.dtype)


@dataclass(frozen=True)
class Parts:
    """A pipeline's parts, which fit together.

    Args:
        unet, vae, text_encoder, tokenizer, scheduler: as in diffusers; models in eval mode.
        text_encoder_2, tokenizer_2: SDXL's second ones, else None.
        settings: what else model_index.json says, e.g. "num_inference_steps" of a student.
        folder: where they came from, or None.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def __post_init__(self) -> None:
        _check(self)

    def components(self) -> dict[str, Any]:
        """The parts by name, absent ones as None."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def prediction(self) -> Prediction:
        """What the network predicts, by its scheduler."""
        return prediction_of(self.scheduler)

    @property
    def alpha_bars(self) -> tuple[float, ...] | None:
        """ᾱ_t of the scheduler, t = 0 … 999; None of a flow."""
        return None if self.prediction == "flow" else alpha_bars_of(self.scheduler)

    @property
    def num_train_timesteps(self) -> int:
        """Steps of the scheduler: a flow's network is told t·num_train_timesteps."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def scale(self) -> LatentScale:
        """Between the VAE's latents and the network's."""
        return scale_of(self.vae)

    @property
    def scaling_factor(self) -> float:
        """Of the VAE."""
        return self.scale.factor

    @property
    def pixels(self) -> int:
        """Pixels a latent, on a side: 8 for Stable Diffusion."""
        return pixels_of(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the network was trained with."""
        return (int(self.unet.config.in_channels), *sides_of(self.unet))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the network was trained with."""
        height, width = sides_of(self.unet)
        return height * self.pixels, width * self.pixels

    @property
    def text_widths(self) -> tuple[int, int | None]:
        """Numbers of an embedding's state and of a pooled embedding, None where there is none."""
        encoders = [e for e in (self.text_encoder, self.text_encoder_2) if e is not None]
        pooled = None if self.text_encoder_2 is None else int(self.text_encoder_2.config.projection_dim)
        return sum(e.config.hidden_size for e in encoders), pooled

    def predictor(self, unet: Any = None) -> Predictor:
        """`Predictor` of the network, or of another one in its place."""
        return predictor(self.unet if unet is None else unet, self.prediction, self.num_train_timesteps)


class Predictor:
    """predict(x, t, text) -> (B, C, H, W), in x's dtype: a UNet2DConditionModel called as few-step SiD calls it.

    x (B, C, H, W) goes in in the network's dtype; t (B,) is the step 0 … 999 of "epsilon" and "v", the time in (0, 1]
    of "flow", whose network is told t·num_train_timesteps, as diffusers' flow schedulers do; text has B rows.

    Args:
        unet: the network, or one that wraps it and has it as `module`.
        prediction: what it predicts.
        num_train_timesteps: of its scheduler.
    """

    def __init__(self, unet: Any, prediction: Prediction = "epsilon", num_train_timesteps: int = 1000) -> None:
        self.unet = unet
        config = getattr(unet, "module", unet).config
        self._factor = num_train_timesteps if prediction == "flow" else 1
        self._added = config.addition_embed_type == "text_time"

    def __call__(self, x: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        dtype = _dtype_of(self.unet)
        added = None
        if self._added:
            if text.pooled is None or text.time_ids is None:
                raise ValueError("this network takes a pooled embedding and time ids too: give both")
            added = {"text_embeds": text.pooled.to(dtype), "time_ids": text.time_ids}
        output = self.unet(
            x.to(dtype),
            t * self._factor if self._factor != 1 else t,
            encoder_hidden_states=text.states.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output.to(x.dtype)


def predictor(unet: Any, prediction: Prediction = "epsilon", num_train_timesteps: int = 1000) -> Predictor:
    """`Predictor` of a network."""
    return Predictor(unet, prediction, num_train_timesteps)


def prediction_of(scheduler: Any) -> Prediction:
    """What a network with this scheduler predicts.

    Raises:
        SignFastError: neither ε, nor v, nor the velocity of a rectified flow.
    """
    name = type(scheduler).__name__
    said = getattr(scheduler.config, "prediction_type", None)
    if name.startswith("FlowMatch") or said == "flow_prediction":
        return "flow"
    if said == "epsilon":
        return "epsilon"
    if said == "v_prediction":
        return "v"
    raise SignFastError(
        f"the scheduler ({name}) has prediction_type {short(said)}: it must be epsilon, v_prediction or flow_prediction"
    )


def alpha_bars_of(scheduler: Any) -> tuple[float, ...]:
    """ᾱ_t, t = 0 … 999, as the scheduler's betas and its rescaling make them.

    Raises:
        SignFastError: it has none, another number of steps, or numbers that no noise level is made of.
    """
    bars = getattr(scheduler, "alphas_cumprod", None)
    name = type(scheduler).__name__
    if not isinstance(bars, Tensor):
        raise SignFastError(
            f"the scheduler ({name}) has no DDPM noise schedule: save the pipeline with a DDPMScheduler"
        )
    values = tuple(bars.tolist())
    if len(values) != 1000:
        raise SignFastError(f"the scheduler has {len(values)} steps: few-step generation is defined on 1000")
    if not all(0 <= a <= 1 for a in values) or not 0 < values[T_INIT] < 1:
        raise SignFastError(
            f"the scheduler's betas make no noise schedule (ᾱ at {T_INIT} is {values[T_INIT]}): mend them"
        )
    return values


def scale_of(vae: Any) -> LatentScale:
    """Between the latents of a VAE and a network's.

    Raises:
        SignFastError: its config says no number above 0, or a mean and deviation that do not fit.
    """
    config = vae.config
    factor, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None) or 0.0
    if not _is_number(factor) or not factor > 0:
        raise SignFastError(
            f"the VAE's scaling_factor must be a number above 0, not {short(factor)}: mend vae/config.json"
        )
    if not _is_number(shift):
        raise SignFastError(f"the VAE's shift_factor must be a number, not {short(shift)}: mend vae/config.json")
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return LatentScale(float(factor), float(shift))
    both = [*mean, *std] if isinstance(mean, list | tuple) and isinstance(std, list | tuple) else []
    channels = config.latent_channels
    if len(both) != 2 * channels or not all(map(_is_number, both)) or not all(s > 0 for s in std):
        raise SignFastError(f"the VAE's latents_mean and latents_std must be {channels} numbers: mend vae/config.json")
    return LatentScale(float(factor), float(shift), tuple(map(float, mean)), tuple(map(float, std)))


def pixels_of(vae: Any) -> int:
    """Pixels a latent of a VAE, on a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def sides_of(unet: Any) -> tuple[int, int]:
    """(H, W) of the latents that a network was trained with.

    Raises:
        SignFastError: its config does not say.
    """
    size = unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise SignFastError(
            f"the UNet's sample_size must be a whole number above 0, not {short(size)}: mend its config"
        )
    return sides


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _dtype_of(net: Any) -> torch.dtype:
    for parameter in net.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


_FEWEST_TOKENS = 3  # a begin, a word and an end
_CLIP = ("get_input_embeddings", "config.hidden_size", "config.max_position_embeddings")
_LOOKS = (
    ("text_encoder", "CLIPTextModel", _CLIP),
    ("text_encoder_2", "CLIPTextModelWithProjection", (*_CLIP, "config.projection_dim")),
    ("tokenizer", "CLIPTokenizer", ("model_max_length", "__len__")),
    ("tokenizer_2", "CLIPTokenizer", ("model_max_length", "__len__")),
    ("scheduler", "scheduler of diffusers", ("config",)),
)  # by what is used of them: they may have been compiled


def _has(part: Any, path: str) -> bool:
    try:
        attrgetter(path)(part)
    except AttributeError:
        return False
    return True


def _check(parts: Parts) -> None:
    """Whether parts are supported and fit together."""
    unet, vae = parts.unet, parts.vae
    wanted = [("unet", "UNet2DConditionModel", unet), ("vae", "AutoencoderKL", vae)]
    for name, class_name, part in wanted:
        if not isinstance(part, getattr(require_diffusers(), class_name)):
            raise SignFastError(
                f"the {name} is a {type(part).__name__}, which is not supported: it must be a {class_name}"
            )
    if (parts.text_encoder_2 is None) != (parts.tokenizer_2 is None):
        raise SignFastError("text_encoder_2 and tokenizer_2 go together: give both or neither")
    for name, class_name, needed in _LOOKS:
        part = getattr(parts, name)
        if not all(map(partial(_has, part), needed)) and not (part is None and name in OPTIONAL):
            raise SignFastError(
                f"the {name} is a {type(part).__name__}, which is not supported: it must be a {class_name}"
            )
    for tokenizer in filter(None, (parts.tokenizer, parts.tokenizer_2)):
        length = tokenizer.model_max_length
        if type(length) is not int or length < _FEWEST_TOKENS:
            raise SignFastError(
                f"a tokenizer has model_max_length {short(length)}: it must be a whole number, 77 for CLIP; mend its "
                "tokenizer_config.json"
            )
    config = unet.config
    channels = (config.in_channels, config.out_channels, vae.config.latent_channels)
    if len(set(channels)) != 1:
        raise SignFastError(
            f"the UNet takes {channels[0]} and gives {channels[1]} channels, the VAE has {channels[2]}: "
            "they must be equal; use the VAE that the UNet was trained with"
        )
    if vae.config.out_channels != 3:
        raise SignFastError(f"the VAE makes images of {vae.config.out_channels} channels: 3 are supported")
    _check_conditioning(parts)
    sides_of(unet)
    if prediction_of(parts.scheduler) != "flow":
        alpha_bars_of(parts.scheduler)
    for name, found in (("vae_scaling_factor", scale_of(vae).factor), ("vae_pixels", pixels_of(vae))):
        said = parts.settings.get(name)
        if said is not None and said != found:
            raise SignFastError(
                f"the VAE does not match: its {name.removeprefix('vae_')} is {found}, the student was distilled for "
                f"{short(said)}; use the VAE that it was saved with"
            )


def _check_conditioning(parts: Parts) -> None:
    config = parts.unet.config
    for name, allowed in (
        ("class_embed_type", (None,)),
        ("num_class_embeds", (None,)),
        ("encoder_hid_dim_type", (None,)),
        ("time_cond_proj_dim", (None,)),
        ("addition_embed_type", (None, "text_time")),
    ):
        if getattr(config, name, None) not in allowed:
            raise SignFastError(
                f"the UNet has {name}={getattr(config, name)!r}, which is not supported: take one without"
            )
    (width, pooled), crossed = parts.text_widths, config.cross_attention_dim
    if any(dim != width for dim in (crossed if isinstance(crossed, list | tuple) else [crossed])):
        raise SignFastError(
            f"the text encoders give embeddings of {width} numbers, the UNet takes {crossed}: they belong to others"
        )
    if config.addition_embed_type != "text_time":
        if parts.text_encoder_2 is not None:
            raise SignFastError("there is a text_encoder_2, but the UNet takes no pooled embedding: they do not fit")
        return
    if parts.text_encoder_2 is None:
        raise SignFastError("the UNet takes a pooled embedding (SDXL), but there is no text_encoder_2: add it")
    assert pooled is not None
    taken, given = config.projection_class_embeddings_input_dim, pooled + 6 * config.addition_time_embed_dim
    if taken != given:
        raise SignFastError(
            f"the UNet takes {taken} numbers of pooled text and sizes, but gets {given}: "
            "text_encoder_2 is another's, or the UNet is a refiner, which is not supported"
        )

"""`SiDPipeline`: text to image in one to four steps, in diffusers' conventions, as one launch."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ...errors import SignFastError, short, whole_number
from ...kernels.dispatch import Reason, fall_back
from ...sampling.latent_engine import LatentEngine, LatentOutput
from ...sampling.requests import DTYPES
from ...sampling.students import StepNoise
from ...sampling.text import TextConditioning
from ...sampling.transfer import to_device
from .arguments import check_latents, check_noise_type, check_prompts, check_size, check_steps, draws_of
from .loading import load_parts
from .lora import LoraMixin
from .parts import PARTS, LatentScale, Parts
from .prompts import PromptEncoder
from .saving import CLASSES, save_folder
from .state import python_state
from .versions import require_diffusers

_diffusers: Any = require_diffusers()
_pipelines: Any = importlib.import_module("diffusers.pipelines.pipeline_utils")

PipelineOutput: TypeAlias = Literal["pil", "np", "pt", "latent"]

_SETTINGS = ("num_inference_steps", "noise_type", "force_zeros_for_empty_prompt", "vae_scaling_factor", "vae_pixels")

_UPCAST = Reason(
    "SDXL's VAE overflows in float16 (force_upcast in its config), so it stays in float32",
    "load in bfloat16, or set force_upcast to false in vae/config.json if it does not overflow",
)


class SiDPipeline(
    _diffusers.DiffusionPipeline,  # type: ignore[misc]
    _pipelines.StableDiffusionMixin,  # type: ignore[misc]
    LoraMixin,
):
    """Few-step text-to-image with a distilled student (few-step SiD, Algorithm 1).

    ::

        pipe = SiDPipeline.from_pretrained("student", torch_dtype=torch.bfloat16).to("cuda")
        images = pipe(["a cat on a mat", "a dog"], num_inference_steps=4, seeds=[1, 2]).images

    The K calls of the network, the noise between them, the decoder and the conversion to bytes are one C++ loop on the
    CPU and one CUDA graph on a GPU (`sampling.latent_engine`); text encoders run before it. A student takes no
    guidance. In float16 an SDXL's VAE that overflows there (its config's force_upcast) is kept in float32, with one
    warning.

    Args:
        vae: AutoencoderKL.
        text_encoder, tokenizer: CLIP's.
        unet: UNet2DConditionModel, the student.
        scheduler: says what the network predicts (prediction_type epsilon, v_prediction or flow_prediction, or a
            FlowMatch class) and its noise schedule; it makes no steps itself. A flow's time in (0, 1] is told to the
            network times num_train_timesteps, without the scheduler's shift.
        text_encoder_2, tokenizer_2: SDXL's.
        num_inference_steps: steps where a call names none, and the most that the student was distilled for.
        noise_type: "fresh", "fixed" or "ddim" where a call names none.
        force_zeros_for_empty_prompt: as in SDXL's pipeline; kept for those who distil.
        vae_scaling_factor, vae_pixels: of the VAE that the student was distilled with, to be compared; None takes them
            from `vae`.

    Raises:
        SignFastError: a part is not supported or does not fit.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2"]  # noqa: RUF012

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        num_inference_steps: int = 4,
        noise_type: str = "fresh",
        force_zeros_for_empty_prompt: bool = False,
        vae_scaling_factor: float | None = None,
        vae_pixels: int | None = None,
    ) -> None:
        super().__init__()
        said = {"vae_scaling_factor": vae_scaling_factor, "vae_pixels": vae_pixels}
        parts = Parts(unet, vae, text_encoder, tokenizer, scheduler, text_encoder_2, tokenizer_2, said)
        self.register_modules(**parts.components())
        self.register_to_config(
            num_inference_steps=check_steps(num_inference_steps),
            noise_type=check_noise_type(noise_type),
            force_zeros_for_empty_prompt=bool(force_zeros_for_empty_prompt),
            vae_scaling_factor=parts.scaling_factor,
            vae_pixels=parts.pixels,
        )
        self._engine: LatentEngine | None = None
        self._engine_of: tuple[Any, ...] = ()

    # ---- folders ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool = True,
        local_files_only: bool = True,
        **parts: Any,
    ) -> SiDPipeline:
        """The pipeline of a folder on this machine.

        A safety_checker, feature_extractor or image_encoder in it is left aside: nothing looks at the images.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` or a distillation wrote; or one of diffusers'
                Stable Diffusion or SDXL pipelines, for a student given as `unet`.
            torch_dtype, dtype: of the models, one name or the other; None for float32.
            variant: of the weights' file names, e.g. "fp16".
            use_safetensors, local_files_only: must be True: pickled weights are not read, and nothing is fetched.
            parts: in the place of the folder's own, e.g. unet=…; or settings, e.g. noise_type="fixed".

        Raises:
            SignFastError: a file is missing or damaged, a part is not supported, or parts do not fit together.
        """
        if torch_dtype is not None and dtype is not None:
            raise SignFastError("torch_dtype and dtype are one option: give one")
        chosen = dtype if torch_dtype is None else torch_dtype
        if chosen is not None and chosen not in DTYPES:
            raise SignFastError(
                f"torch_dtype must be torch.bfloat16, torch.float16 or torch.float32, not {short(chosen)}"
            )
        if not use_safetensors:
            raise SignFastError("use_safetensors=False would read pickles, which can run code: leave it away")
        if not local_files_only:
            raise SignFastError(
                "nothing is fetched: download the folder (hf download NAME --local-dir DIR), then name it"
            )
        settings = {name: parts.pop(name) for name in [*parts] if name in _SETTINGS}
        if unknown := [name for name in parts if name not in PARTS]:
            raise SignFastError(f"from_pretrained takes no {unknown[0]}: leave it away")
        found = load_parts(pretrained_model_name_or_path, dtype=chosen, variant=variant, **parts)
        said = {name: found.settings[name] for name in _SETTINGS if name in found.settings}
        pipe = cls(**found.components(), **{**said, **settings})
        if "num_inference_steps" not in said and "unet" not in parts:
            warnings.warn(
                f"{pretrained_model_name_or_path} is a {found.settings['_class_name']}, not a distilled student: a few "
                "steps of it make no good images; distil it (sign-fast distill), or give its student as unet=",
                stacklevel=2,
            )
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        card: str | None = None,
        **options: Any,
    ) -> None:
        """Write the pipeline's folder, whole or not at all; an older pipeline there is replaced in one step.

        Args:
            save_directory: a new folder, an empty one, or a pipeline's; other files of a pipeline's folder are kept.
            safe_serialization: must be True: weights are safetensors.
            variant: in the weights' file names.
            card: text of README.md, or None.
            options: max_shard_size, as in diffusers.

        Raises:
            SignFastError: the folder holds something else, a network has adapters, or it cannot be written.
        """
        if not safe_serialization:
            raise SignFastError("safe_serialization=False would write pickles: leave it away")
        if options.pop("push_to_hub", False):
            raise SignFastError("push_to_hub is a step of its own: save, then call pipe.push_to_hub(NAME)")
        if unknown := [name for name in options if name != "max_shard_size"]:
            raise SignFastError(f"save_pretrained takes no {unknown[0]}: leave it away")
        self.register_to_config(**{name: ("diffusers", class_name) for name, class_name in CLASSES.items()})
        write = super().save_pretrained
        save_folder(
            Path(save_directory),
            {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)},
            lambda folder: write(str(folder), variant=variant, **options),
            card,
        )

    # ---- generation ----

    @property
    def engine(self) -> LatentEngine:
        """What generates, for the parts as they are now; `engine.graphs` tells what is captured on CUDA."""
        current = (self.unet, self.vae, self.scheduler)
        if self._engine is None or any(a is not b for a, b in zip(current, self._engine_of, strict=True)):
            parts = self._parts()
            networks = [self.unet, self.vae]
            self._engine = LatentEngine(
                parts.predictor(),
                networks,
                _Decoder(self.vae, parts.scale),
                prediction=parts.prediction,
                bars=parts.alpha_bars,
                state=lambda: python_state(networks),
            )
            self._engine_of = current
        return self._engine

    def _parts(self) -> Parts:
        return Parts(**{name: getattr(self, name) for name in PARTS})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise_type: StepNoise | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seeds: int | Iterable[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: PipelineOutput = "pil",
        return_dict: bool = True,
        negative_prompt: Any = None,
        guidance_scale: float | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Any:
        """Generate images of prompts.

        Args:
            prompt: one text or several; longer ones than the text encoder reads are cut, with one warning.
            num_inference_steps: 1 to 4, or what the student was distilled for; None means the pipeline's setting.
            generator: one for all images, as in diffusers, or one an image: then an image depends on its own alone.
            noise_type: of the steps after the first: "fresh", "fixed" (the latents again) or "ddim" (what the last step
                implies); None means the pipeline's setting.
            height, width: of the images in pixels; None means those that the network was trained with.
            num_images_per_prompt: images a prompt; those of the first prompt come first.
            seeds: one an image, in the place of `generator`: an image depends on its own seed alone.
            latents: (B, C, height/8, width/8) standard normal, in the place of those that are drawn.
            prompt_embeds: (prompts, T, D) in the place of `prompt`, as `PromptEncoder.encode` gives its states.
            pooled_prompt_embeds: (prompts, P), SDXL's, with them.
            output_type: "pil", "np" for (B, H, W, 3) float32 in [0, 1], "pt" for (B, 3, H, W) of the same, or "latent"
                for (B, C, H/8, W/8) float32.
            return_dict: an ImagePipelineOutput, else a tuple.
            negative_prompt, guidance_scale: refused: guidance was distilled into the student.
            callback_on_step_end: refused: the steps are one launch.

        Returns:
            An object with `images`, or a tuple of them alone.

        Raises:
            SignFastError: any of these is wrong; nothing has been computed then.
        """
        if callback_on_step_end is not None:
            raise SignFastError("the steps are one launch, with nothing in between: leave callback_on_step_end away")
        if negative_prompt is not None or guidance_scale not in (None, 0, 1):
            raise SignFastError("a distilled student takes no guidance: leave guidance_scale and negative_prompt away")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise SignFastError(f"output_type must be pil, np, pt or latent, not {short(output_type)}")
        steps = self._steps(num_inference_steps)
        noise = check_noise_type(self.config.noise_type if noise_type is None else noise_type)
        each = whole_number(num_images_per_prompt, "num_images_per_prompt")
        if each < 1:
            raise SignFastError(f"num_images_per_prompt must be at least 1, not {each}")
        engine, parts = self.engine, self._parts()
        size = check_size(height, width, parts.image_size, parts.pixels)
        prompts = check_prompts(prompt, prompt_embeds, pooled_prompt_embeds, parts.text_widths)
        count = each * len(prompt_embeds if prompts is None else prompts)  # type: ignore[arg-type]
        shape = (count, parts.latent_shape[0], size[0] // parts.pixels, size[1] // parts.pixels)
        randn_like = draws_of(count, engine.device, generator, seeds)
        given = None if latents is None else check_latents(latents, shape)
        if prompts is not None:
            text = PromptEncoder(self).encode(prompts, size=size)
        else:
            text = _given_text(prompt_embeds, pooled_prompt_embeds, size)
        text = text.to(engine.device)
        if each > 1:
            text = text[torch.arange(count, device=engine.device) // each]
        if given is None:
            given = randn_like(torch.empty(shape, dtype=torch.float32, device=engine.device))
        if output_type != "latent":
            self._upcast_vae()
        output: LatentOutput = "uint8" if output_type == "pil" else "latent" if output_type == "latent" else "float"
        images = engine.generate(to_device(given, engine.device), text, steps, noise, randn_like, output)
        result = _delivered(images, output_type)
        return _pipelines.ImagePipelineOutput(images=result) if return_dict else (result,)

    def _steps(self, given: int | None) -> int:
        distilled: int = self.config.num_inference_steps
        steps = distilled if given is None else check_steps(given)
        if steps > distilled:
            warnings.warn(f"this student was distilled for {distilled} steps at most, not {steps}", stacklevel=4)
        return steps

    def _upcast_vae(self) -> None:
        """Keep SDXL's VAE in float32 where it overflows in float16, as its pipeline in diffusers does while it decodes.

        Those before it say force_upcast too, by default, and do not overflow.
        """
        dtype = self.vae.dtype
        overflows = dtype == torch.float16 or (dtype == torch.float32 and self.unet.dtype == torch.float16)
        if self.text_encoder_2 is not None and self.vae.config.force_upcast and overflows:
            fall_back("decoding", _UPCAST)
            self.vae.to(torch.float32)

    # ---- what diffusers' pipelines can do ----

    def enable_model_cpu_offload(self, *args: Any, **options: Any) -> None:
        """Refused.

        Raises:
            SignFastError: always; it says what to do instead.
        """
        raise SignFastError(
            "a launch reads the weights where they lie, so they cannot come and go: encode the prompts with "
            'PromptEncoder, move the text encoders away with pipe.text_encoder.to("cpu") and give prompt_embeds'
        )

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload


class _Decoder:
    """Latents to images in about [-1, 1]; its constants are made once a device, so that a capture finds them there."""

    def __init__(self, vae: Any, scale: LatentScale) -> None:
        self._vae = vae
        self._scale = scale
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, latents: Tensor) -> Tensor:
        if latents.device not in self._constants:
            self._constants[latents.device] = self._scale.constants(latents.device)
        factor, shift = self._constants[latents.device]
        images: Tensor = self._vae.decode((latents * factor + shift).to(self._vae.dtype), return_dict=False)[0]
        return images


def _given_text(states: Any, pooled: Tensor | None, size: tuple[int, int]) -> TextConditioning:
    if pooled is None:
        return TextConditioning(states)
    times = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=states.device)
    return TextConditioning(states, pooled, times.expand(len(states), 6))


def _delivered(images: Tensor, output_type: PipelineOutput) -> Any:
    """The engine's images as diffusers hands them out."""
    if output_type == "latent":
        return images
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(image) for image in images.cpu().numpy()]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

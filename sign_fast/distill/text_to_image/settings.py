"""The settings of `--method sid-latent`, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import SignFastError
from ..latent import FLOW_WEIGHTS, STRATEGIES, Guidance, guidance
from ..latent_predictions import PredictionType
from ..run_settings import RunSettings, check_alpha, check_common, check_shares, check_student_moves, common_remarks

Noise = Literal["fresh", "fixed", "ddim"]
GUIDANCE = (*STRATEGIES, "anti-cfg")
_FLOW_SCALE = 100.0  # lsg of a flow


@dataclass(frozen=True)
class TextToImageSettings(RunSettings):
    """Settings of a run of a diffusers pipeline.

    Args:
        method: "sid-latent".
        teacher: a pipeline's folder, as diffusers' save_pretrained writes it.
        data: folder of images with captions, for the Diffusion-GAN term; None leaves it away.
        prompts: file of prompts, one a line, or .parquet. prompt_column: of that table; None: "prompt", "text" or
            "caption".
        guidance: κ1 … κ4, see `latent.guidance`. guidance_scale: of "anti-cfg".
        noise_type: of the student's calls 2 …: "fresh", "fixed" or "ddim".
        alpha: of the student's loss.
        student_scale: factor lsg of that loss; None: 1, or 100 of a flow.
        flow_weight: of a flow's student loss, one of `latent.FLOW_WEIGHTS`; nothing else reads it.
        resolution: of the images in pixels; None: that of the teacher.
        fake_lora: rank of adapters on the teacher that are the fake score; 0: a network of its own.
        accelerate: the networks on sign_fast's operations, see `integrations.diffusers.accelerate`.
        samples: images of a check, of prompts spread over the file.
        cache: folder of embeddings and latents, for several runs to share; None: one in the run's.
        adversarial_weight: lsg_gan. adversarial_kimg, student_kimg: as in `RunSettings`, from the start by default.
        stop_factor: stop where the latents' deviation is this many times further from its reference than at best.
    """

    method: Literal["sid-latent"]
    batch: int = 512
    kimg: float = 10_000
    lr: float = 1e-6
    adversarial_weight: float = 1.0
    adversarial_kimg: float = 0
    student_kimg: float = 0
    prompts: str = ""
    prompt_column: str | None = None
    guidance: str = "none"
    guidance_scale: float | None = None
    noise_type: Noise = "fresh"
    alpha: float = 1.0
    student_scale: float | None = None
    flow_weight: str = "1-t"
    resolution: int | None = None
    fake_lora: int = 0
    accelerate: bool = False
    samples: int = 16
    cache: str | None = None

    @property
    def adversarial(self) -> bool:
        return self.data is not None

    @property
    def scales(self) -> Guidance:
        """κ1 … κ4."""
        return guidance(self.guidance, self.guidance_scale)

    def student_scale_for(self, prediction: PredictionType) -> float:
        """lsg."""
        if self.student_scale is not None:
            return self.student_scale
        return _FLOW_SCALE if prediction == "flow" else 1.0


def check_text_settings(settings: TextToImageSettings) -> None:
    """What can be said of settings alone.

    Raises:
        SignFastError: naming the first that is out of range, or that does not go with another.
    """
    s = settings
    choices = {
        "method": ("sid-latent",),
        "noise_type": ("fresh", "fixed", "ddim"),
        "flow_weight": FLOW_WEIGHTS,
        "guidance": GUIDANCE,
    }
    check_common(s, choices, ("student_scale",), ("fake_lora",), ("samples",))
    check_alpha(s.alpha)
    if not s.prompts:
        raise SignFastError("sid-latent trains on prompts: name a file of them with --prompts")
    try:
        _ = s.scales
    except ValueError as error:
        raise SignFastError(f"{error} (--guidance-scale)") from error
    if s.resolution is not None and s.resolution < 1:
        raise SignFastError(f"resolution must be at least 1, not {s.resolution}")
    check_student_moves(s)


def check_resolution(resolution: int, latent_pixels: int, levels: int) -> None:
    """That latents of so many pixels go through the UNet.

    Args:
        resolution: of the images.
        latent_pixels: pixels of the image a latent, 8 of Stable Diffusion.
        levels: resolutions of the UNet, each half of the one before.

    Raises:
        SignFastError: they do not.
    """
    unit = latent_pixels * 2 ** (levels - 1)
    if resolution % unit or not unit <= resolution <= 8192:
        raise SignFastError(
            f"resolution must be a multiple of {unit} from {unit} to {8192 // unit * unit} with this teacher, "
            f"not {resolution}: change --resolution"
        )


def check_text_fit(settings: TextToImageSettings, prediction: PredictionType, world: int) -> None:
    """What depends on the teacher and the number of processes.

    Raises:
        SignFastError: they do not fit.
    """
    check_shares(settings, world)
    if settings.flow_weight != "1-t" and prediction != "flow":
        raise SignFastError(f"--flow-weight is of flows, and {settings.teacher} predicts {prediction}: leave it away")


def text_remarks(settings: TextToImageSettings, world: int) -> list[str]:
    """Lines on what a run of these settings does that one might not expect."""
    s = settings
    found = ["no quality figure is measured: look at the sample grids, the score gaps and the latents' deviation"]
    if s.guidance == "none":
        found.append("--guidance none: the student is as good as the teacher without guidance; consider lsg")
    return found + common_remarks(s, world)

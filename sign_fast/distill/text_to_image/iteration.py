"""One iteration of a text-to-image distillation."""

from __future__ import annotations

import torch

from ..iteration import Updates
from ..latent_predictions import Prediction
from ..method import Losses
from .inputs import Share
from .method import LatentMethod, TextStep
from .networks import ADAPTERS, LatentNetworks
from .settings import TextToImageSettings


class LatentIteration(Updates):
    """`Updates` of UNets of diffusers.

    Args:
        settings: of the run.
        networks: of `build_latent_networks`.
        prediction: what they predict.
        shape: (C, H, W) of the latents.
        student_scale: lsg.
        device: of the run.
    """

    method: LatentMethod

    def __init__(
        self,
        settings: TextToImageSettings,
        networks: LatentNetworks,
        prediction: Prediction,
        shape: tuple[int, int, int],
        student_scale: float,
        device: torch.device,
    ) -> None:
        self.settings, self.networks = settings, networks
        method = LatentMethod(settings, networks, prediction, shape, student_scale)
        adapters = ADAPTERS if settings.fake_lora else None
        super().__init__(settings, networks, method, student_scale, device, adapters=adapters)

    def run(self, number: int, share: Share) -> Losses:
        """Fake score, student, average.

        Args:
            number: of the iteration, from 0.
            share: what this process reads in it.

        Returns:
            Means of the losses over this process's samples, and gradient norms, as tensors on the device.
        """
        s = self.settings
        step = TextStep(
            self._draws(number),
            self.call_at(number),
            share.latents,
            adversarial=s.adversarial and number * s.batch >= s.adversarial_kimg * 1000,
            fake_texts=share.fake_texts,
            student_text=share.student_text,
            real_text=share.real_text,
        )
        return self.apply(number, step)

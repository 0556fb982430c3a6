"""`ImageGenerator`: seeds in, images out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import SignFastError
from .engine import Engine
from .requests import Labels, NetworkTraits, Noise, Output, Request, Sampler, check_choices, check_request, check_steps
from .transfer import Array, PinnedRing, Transfer, begin_transfer

DEFAULT_STEPS = {"teacher": 18, "student": 1}


class ImageGenerator:
    """Generates images with a network; image i depends on its seed alone, up to rounding.

    ::

        generator = ImageGenerator.from_pretrained("digits-uncond")
        images = generator(range(64))  # uint8 (64, 8, 8, 1) on the network's device

        pending = generator.submit(range(64))  # returns while the GPU works
        array = pending.result()  # NumPy, when it is needed

        for array in generator.stream([range(0, 64), range(64, 128)]):  # the next batch is under way already
            save(array)

    Args:
        net: a network of `sign_fast.models`, of which an inference copy is made (`generator.net.update(net)` takes its
            weights after further training), or any denoiser net(x, sigma, class_labels) that says its img_resolution
            and img_channels, and its label_dim where it has classes; see `sampling.engine.Engine`.
        role: "teacher" (many steps, Heun) or "student" (one to four calls).
        steps: sampling steps where a call names none; None means 18 for a teacher and 1 for a student.
        sigma: noise level of a student's input where a call names none; None means 2.5.
        dtype: of the inner network: float32, bfloat16 or float16; None keeps the network's own.
        noise: "torch", the published draws of each seed, or "philox", other draws that are made faster.
        consume: the network will not be used elsewhere: its memory is freed while the inference copy is made.

    Attributes:
        default_steps: sampling steps where a call names none.
        engine: what generates; `engine.graphs` tells what is captured on CUDA, and clears it.

    Raises:
        SignFastError: an unknown role, dtype or noise, or a network that does not fit.
    """

    def __init__(
        self,
        net: Any,
        role: str = "student",
        *,
        steps: int | None = None,
        sigma: float | None = None,
        dtype: torch.dtype | None = None,
        noise: Noise = "torch",
        consume: bool = False,
    ) -> None:
        if role not in DEFAULT_STEPS:
            raise SignFastError(f"role must be teacher or student, not {role!r}")
        check_choices(dtype, noise)
        self.role = role
        self.default_steps = DEFAULT_STEPS[role] if steps is None else check_steps(steps)
        self._sigma = sigma
        self._traits = NetworkTraits.of(net)
        self.engine = Engine(net, dtype=dtype, consume=consume, noise=noise)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        noise: Noise = "torch",
    ) -> ImageGenerator:
        """A generator with the network of a folder, a published snapshot, a bundled name or a repository of the Hub.

        Args:
            path_or_name, device: as in `sign_fast.models.load`.
            dtype, noise: as in the constructor.

        Raises:
            SignFastError: the network cannot be loaded, or an argument is wrong; one line saying why.
        """
        from ..checkpoints.store import find, read_config
        from ..models import load

        check_choices(dtype, noise)
        place = find(path_or_name)
        config = read_config(place)
        if place.is_file() and "role" not in config:
            raise SignFastError(
                f"{place} does not tell whether it is a teacher or a student: sign-fast convert it with --role, or say "
                "ImageGenerator(models.load(path), role)"
            )
        role, sampling = config.get("role", "student"), config.get("sampling", {})
        return cls(load(place, device), role, **sampling, dtype=dtype, noise=noise, consume=True)

    @property
    def net(self) -> Any:
        """What generates: the inference copy of a network of `sign_fast.models`, otherwise the denoiser given."""
        return self.engine.net

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.engine.device

    @property
    def label_dim(self) -> int:
        """Number of classes, 0 for an unconditional network."""
        return self.engine.label_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.engine.img_channels, self.engine.img_resolution, self.engine.img_resolution

    @property
    def sampler(self) -> str:
        """The sampler that is used where none is named."""
        if self._traits.time_free:
            return "recursive"
        return "edm" if self.role == "teacher" else "few_step"

    def __call__(
        self,
        seeds: Iterable[int],
        steps: int | None = None,
        labels: Labels = None,
        sampler: str | Sampler | None = None,
        *,
        output: Output = "uint8",
        **options: Any,
    ) -> Tensor:
        """Generate one image a seed.

        Args:
            seeds: whole numbers from 0, below 2⁶³, each once.
            steps: sampling steps; None means `default_steps`.
            labels: a class number, or one an image; None draws them from the seeds where the network has classes.
            sampler: "edm", "ablation", "one_step", "few_step"; for a student without a time input "recursive" or
                "multistep"; or a function with `edm_sampler`'s first five arguments, which calls the network as it
                likes. None means "edm" for a teacher, "few_step" for a student, "recursive" for one without a time
                input.
            output: "uint8", or "float" for values in about [-1, 1].
            options: of the sampler, e.g. rho=7 or S_churn=40.

        Returns:
            (B, H, W, C) uint8, or (B, C, H, W) float32, on the network's device.

        Raises:
            SignFastError: any of these is wrong; nothing has been computed then.
        """
        return self._generate(self._request(seeds, steps, labels, sampler, output, options))

    def check(
        self,
        seeds: Iterable[int],
        steps: int | None = None,
        labels: Labels = None,
        sampler: str | Sampler | None = None,
        *,
        output: Output = "uint8",
        **options: Any,
    ) -> None:
        """Raise the error that the same call would raise, and generate nothing."""
        self._request(seeds, steps, labels, sampler, output, options)

    def submit(
        self,
        seeds: Iterable[int],
        steps: int | None = None,
        labels: Labels = None,
        sampler: str | Sampler | None = None,
        *,
        output: Output = "uint8",
        **options: Any,
    ) -> Transfer:
        """As `__call__`, for a NumPy array on the host: `.result()` of what is returned waits for it.

        On CUDA the call returns once the work is launched, and the copy goes through pinned memory on a stream of its
        own; on the CPU the images are there when it returns.
        """
        return self._submit(self._request(seeds, steps, labels, sampler, output, options))

    def stream(
        self,
        batches: Iterable[Iterable[int]],
        steps: int | None = None,
        labels: Labels = None,
        sampler: str | Sampler | None = None,
        *,
        output: Output = "uint8",
        **options: Any,
    ) -> Iterator[Array]:
        """The images of several batches, in order, as NumPy arrays on the host.

        On CUDA a batch is launched before the one ahead of it is handed out, so that the GPU works while its images
        are copied and used. Everything is checked before this returns.

        Args:
            batches: lists of seeds; no seed twice in all of them together.
            labels: a class number, or one an image over all batches; None as in `__call__`.
            steps, sampler, output, options: as in `__call__`.

        Returns:
            Arrays as `__call__` gives them, one a batch.

        Raises:
            SignFastError: as in `__call__`; no batches, or an empty one.
        """
        parts = [list(seeds) for seeds in batches]
        if not all(parts):
            raise SignFastError("a batch without seeds: leave it away")
        whole = self._request([seed for part in parts for seed in part], steps, labels, sampler, output, options)
        return self._in_turn(whole.cut([len(part) for part in parts]))

    def _in_turn(self, requests: list[Request]) -> Iterator[Array]:
        ahead = 1 if self.device.type == "cuda" else 0  # on the CPU a batch launched ahead would only be waited for
        pending: deque[Transfer] = deque()
        for request in requests:
            pending.append(self._submit(request))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _request(
        self,
        seeds: Iterable[int],
        steps: int | None,
        labels: Labels,
        sampler: str | Sampler | None,
        output: Output,
        options: dict[str, Any],
    ) -> Request:
        sampler = self.sampler if sampler is None else sampler
        if steps is None:
            steps = 1 if sampler == "one_step" else self.default_steps
            if sampler == "multistep" and isinstance(options.get("noise_levels"), Sequence):
                steps = len(options["noise_levels"]) + 1
        if self._sigma is not None and sampler in ("one_step", "few_step"):
            options = {"sigma": self._sigma, **options}
        request = check_request(self._traits, seeds, sampler, steps, labels, output, options, self.engine.noise)
        self.engine.check(request.sampler, request.steps, request.options)
        return request

    def _generate(self, request: Request) -> Tensor:
        r = request
        return self.engine.generate(r.seeds, r.sampler, r.steps, r.labels, r.output, **r.options)

    @cached_property
    def _ring(self) -> PinnedRing | None:
        return PinnedRing(self.device) if self.device.type == "cuda" else None

    def _submit(self, request: Request) -> Transfer:
        return begin_transfer(self._generate(request), self._ring)

"""The time-free student of SIGN, f(u) = a·u + b·R(u), which starts as its teacher's one-step denoiser."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .precond import Precond, edm_coefficients

# arguments of the preconditioners that the time-free student has no use for
_PRECONDITIONING = {"beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2", "sigma_min", "sigma_max", "sigma_data"}


class IdempotentPrecond(Precond):
    """f(u) = a·u + b·R(u) in flow coordinates u = (1−t)·x + t·ε: R is a teacher's network, its noise level frozen.

    At σ, t = σ/(1+σ) and the teacher's input is u/(1−t) = (1+σ)·u. So that f starts as the teacher's denoised image,
    a = c_skip(σ)·(1+σ), b = c_out(σ), and R(u) = net(c_in(σ)·(1+σ)·u; c_noise(σ)).

    Args:
        sigma: the frozen noise level; 80 is where generation starts, t = 80/81.
        teacher_coefficients: (c_skip, c_out, c_in, c_noise) at sigma of a teacher that is not EDM's; None: EDM's.
        out_channels: outputs of the inner network; None means img_channels.
        others: as in `EDMPrecond`. sigma_min and sigma_max are kept, but mean nothing to f.
    """

    time_free = True

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
        sigma: float = 80.0,
        teacher_coefficients: tuple[float, float, float, float] | None = None,
        out_channels: int | None = None,
        dtype: torch.dtype | None = None,
        **model_kwargs: Any,
    ) -> None:
        outputs = img_channels if out_channels is None else out_channels
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, outputs, model_type, model_kwargs, dtype)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma = sigma
        if teacher_coefficients is None:
            # on the CPU, whatever the default: a network is loaded by way of the meta device
            level = torch.tensor(sigma, dtype=torch.float64, device="cpu")
            c_skip, c_out, c_in, c_noise = edm_coefficients(level, sigma_data)
            teacher_coefficients = float(c_skip), float(c_out), float(c_in), float(c_noise)
        self.teacher_coefficients = teacher_coefficients

    @classmethod
    def from_teacher(cls, teacher: Precond, sigma: float = 80.0) -> IdempotentPrecond:
        """A student with a copy of the teacher's weights: f(u) = D((1+σ)·u; σ) to begin with.

        Args:
            teacher: any of the preconditioned networks.
            sigma: the noise level to freeze, rounded as the teacher's `round_sigma` does.

        Raises:
            TypeError: teacher is not a preconditioned network, or time-free itself.
        """
        if not isinstance(teacher, Precond) or isinstance(teacher, IdempotentPrecond):
            raise TypeError(
                f"a teacher is a denoiser of sign_fast.models such as EDMPrecond, not {type(teacher).__name__}"
            )
        student = cls.__new__(cls)
        nn.Module.__init__(student)
        for name in ("img_resolution", "img_channels", "label_dim", "use_fp16", "dtype", "sigma_min", "sigma_max"):
            setattr(student, name, getattr(teacher, name))
        level = teacher.round_sigma(torch.tensor(sigma, dtype=torch.float64)).reshape(1, 1, 1, 1)
        student.sigma = float(level)
        c_skip, c_out, c_in, c_noise = (float(c) for c in teacher.coefficients(level))
        student.teacher_coefficients = (c_skip, c_out, c_in, c_noise)
        student.model = copy.deepcopy(teacher.model)
        student._init = ((), student_kwargs(teacher, student, teacher.init_kwargs()))
        return student.train(teacher.training)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, factor of u at the network's input, noise label), the same at every sigma (B or 1, 1, 1, 1)."""
        c_skip, c_out, c_in, c_noise = self.teacher_coefficients
        values = (c_skip * (1 + self.sigma), c_out, c_in * (1 + self.sigma), c_noise)
        a, b, factor, noise = (torch.full_like(sigma, value) for value in values)
        return a, b, factor, noise

    def forward(  # type: ignore[override]
        self, u: Tensor, class_labels: Tensor | None = None, *, dtype: torch.dtype | None = None, **model_kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """f(u).

        Args:
            u: (B, img_channels, H, W) in flow coordinates, any floating dtype; cast to float32.
            class_labels: (B, label_dim) or (1, label_dim); None means zeros where label_dim > 0.
            dtype, model_kwargs: as in `Precond.forward`.

        Returns:
            (B, img_channels, H, W) float32 (float64 if dtype is float64, for checks).

        Raises:
            ValueError: class_labels do not fit label_dim, or the dtype is unknown.
        """
        return super().forward(u, self.sigma, class_labels, dtype=dtype, **model_kwargs)


def student_kwargs(teacher: Precond, student: IdempotentPrecond, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What builds the student that `from_teacher` made of a teacher with those arguments."""
    kept = {name: value for name, value in kwargs.items() if name not in _PRECONDITIONING}
    conv = list(teacher.model.dec.values())[-1] if hasattr(teacher.model, "dec") else None
    outputs = getattr(getattr(teacher.model, "out_conv", conv), "out_channels", teacher.img_channels)
    own = {
        "model_type": type(teacher.model).__name__,
        "sigma": student.sigma,
        "teacher_coefficients": list(student.teacher_coefficients),
    }
    return {**kept, **own} if outputs == teacher.img_channels else {**kept, **own, "out_channels": outputs}

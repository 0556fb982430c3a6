"""The torch.ops of GroupNorm–SiLU: schemas, shapes, Triton on CUDA, plain torch where C++ has not taken the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..device import device_of
from ..launch import run
from ..operators import TAGS, register
from . import reference
from .launches import (
    launches_backward,
    launches_forward,
    launches_parameter_gradients,
    like,
    readable,
    rows,
)

OptionalTensor: TypeAlias = Tensor | None

_library = torch.library.Library("sign_fast", "FRAGMENT")
_define = partial(_library.define, tags=TAGS)
_NORM = (
    "(Tensor x, Tensor? x2, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? emb, Tensor? input_bias, "
    "Tensor? scale, Tensor? shift, bool silu)"
)
_JOIN = (
    "(Tensor h, Tensor skip, Tensor? bias, float skip_scale, int num_groups, Tensor? weight, Tensor? norm_bias, "
    "float eps, bool silu)"
)
_define(f"group_norm_silu{_NORM} -> Tensor")
_define(f"group_norm_silu_forward{_NORM} -> (Tensor y, Tensor stats)")
_define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor? x2, Tensor stats, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? emb, Tensor? input_bias, Tensor? scale, Tensor? shift, bool silu, Tensor? stream, "
    "float skip_scale, bool input_sum) -> (Tensor dx, Tensor dx2, Tensor sums)"
)
_define(
    "group_norm_silu_parameter_gradients(Tensor sums, Tensor? weight, Tensor? bias, Tensor? scale) "
    "-> (Tensor vectors, Tensor dscale)"
)
_define(f"residual_group_norm_silu{_JOIN} -> (Tensor r, Tensor y)")
_define(f"residual_group_norm_silu_forward{_JOIN} -> (Tensor r, Tensor y, Tensor stats)")


# ---- shapes, for torch.compile and export ----


def _fake_y(x: Tensor, x2: OptionalTensor, *others: Any) -> Tensor:
    return like(x, x.shape[1] + (0 if x2 is None else x2.shape[1]))


def _fake_stats(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float32)


def _fake_forward(x: Tensor, x2: OptionalTensor, num_groups: int, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake_y(x, x2), _fake_stats(x, num_groups)


def _fake_backward(
    dy: Tensor, x: Tensor, x2: OptionalTensor, stats: Tensor, num_groups: int, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sums = stats.new_empty((3, x.shape[0], dy.shape[1]))
    return like(x), x.new_empty(0) if x2 is None else like(x2), sums


def _fake_parameter_gradients(
    sums: Tensor, weight: OptionalTensor, bias: OptionalTensor, scale: OptionalTensor
) -> tuple[Tensor, Tensor]:
    vectors = sums.new_empty((3, sums.shape[2]))
    return vectors, sums.new_empty(0 if scale is None else sums.shape[1:])


def _fake_join(h: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return like(h), like(h)


def _fake_join_forward(
    h: Tensor, skip: Tensor, bias: OptionalTensor, skip_scale: float, num_groups: int, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return like(h), like(h), _fake_stats(h, num_groups)


# ---- Triton ----


def _prepare(x: Tensor, x2: OptionalTensor) -> tuple[Tensor, OptionalTensor]:
    if x2 is not None:
        layout = suggest_memory_format(x)
        x2 = readable(x2) if suggest_memory_format(x2) == layout else x2.contiguous(memory_format=layout)
    return readable(x), x2


def _vector(t: OptionalTensor) -> OptionalTensor:
    return t if t is None else t.contiguous()


def _triton_forward(
    x: Tensor,
    x2: OptionalTensor,
    num_groups: int,
    weight: OptionalTensor,
    bias: OptionalTensor,
    eps: float,
    emb: OptionalTensor,
    input_bias: OptionalTensor,
    scale: OptionalTensor,
    shift: OptionalTensor,
    silu: bool,
    *,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    y, stats = _fake_y(x, x2), _fake_stats(x, num_groups)
    if y.numel():
        x, x2 = _prepare(x, x2)
        launches = launches_forward(
            x,
            x2,
            y,
            stats if statistics else None,
            num_groups,
            _vector(weight),
            _vector(bias),
            eps,
            device_of(x),
            emb=rows(emb),
            input_bias=_vector(input_bias),
            scale=rows(scale),
            shift=rows(shift),
            silu=silu,
        )
        run(launches, x.device)
    return y, stats


def _triton(*arguments: Any) -> Tensor:
    return _triton_forward(*arguments, statistics=False)[0]


def _triton_join_forward(
    h: Tensor,
    skip: Tensor,
    bias: OptionalTensor,
    skip_scale: float,
    num_groups: int,
    weight: OptionalTensor,
    norm_bias: OptionalTensor,
    eps: float,
    silu: bool,
    *,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r, y, stats = _fake_join_forward(h, skip, bias, skip_scale, num_groups)
    if y.numel():
        h = readable(h)
        launches = launches_forward(
            h,
            None,
            y,
            stats if statistics else None,
            num_groups,
            _vector(weight),
            _vector(norm_bias),
            eps,
            device_of(h),
            silu=silu,
            skip=skip.contiguous(memory_format=suggest_memory_format(r)),
            r=r,
            join_bias=_vector(bias),
            skip_scale=skip_scale,
        )
        run(launches, h.device)
    return r, y, stats


def _triton_join(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _triton_join_forward(*arguments, statistics=False)[:2]


def _triton_backward(
    dy: Tensor,
    x: Tensor,
    x2: OptionalTensor,
    stats: Tensor,
    num_groups: int,
    weight: OptionalTensor,
    bias: OptionalTensor,
    emb: OptionalTensor,
    input_bias: OptionalTensor,
    scale: OptionalTensor,
    shift: OptionalTensor,
    silu: bool,
    stream: OptionalTensor,
    skip_scale: float,
    input_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dx2, sums = _fake_backward(dy, x, x2, stats, num_groups)
    if not dy.numel():
        return dx, dx2, sums.zero_()
    layout = suggest_memory_format(x)
    x, x2 = _prepare(x, x2)
    launches = launches_backward(
        dy.contiguous(memory_format=layout),
        x,
        x2,
        dx,
        None if x2 is None else dx2,
        sums,
        stats,
        num_groups,
        _vector(weight),
        _vector(bias),
        device_of(x),
        emb=rows(emb),
        input_bias=_vector(input_bias),
        scale=rows(scale),
        shift=rows(shift),
        silu=silu,
        stream=None if stream is None else stream.contiguous(memory_format=layout),
        skip_scale=skip_scale,
        input_sum=input_sum,
    )
    run(launches, x.device)
    return dx, dx2, sums


def _triton_parameter_gradients(
    sums: Tensor, weight: OptionalTensor, bias: OptionalTensor, scale: OptionalTensor
) -> tuple[Tensor, Tensor]:
    vectors, dscale = _fake_parameter_gradients(sums, weight, bias, scale)
    launches = launches_parameter_gradients(
        sums, _vector(weight), _vector(bias), rows(scale), vectors, None if scale is None else dscale
    )
    run(launches, sums.device)
    return vectors, dscale


# ---- plain torch, where no faster version is loaded ----


def _dense_like(y: Tensor, x: Tensor) -> Tensor:
    return y.contiguous(memory_format=suggest_memory_format(x))


def _plain(*arguments: Any) -> Tensor:
    y = reference.group_norm_silu(*arguments)
    return _dense_like(y, arguments[0])


def _plain_forward(x: Tensor, x2: OptionalTensor, num_groups: int, *others: Any) -> tuple[Tensor, Tensor]:
    _, _, eps, emb, input_bias, _, _, _ = others
    stats = reference.statistics(x, x2, num_groups, eps, emb, input_bias)
    return _plain(x, x2, num_groups, *others), stats.float()


def _plain_join(*arguments: Any) -> tuple[Tensor, Tensor]:
    r, y = reference.residual_group_norm_silu(*arguments)
    return _dense_like(r, arguments[0]), _dense_like(y, arguments[0])


def _plain_join_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    r, y = _plain_join(*arguments)
    return r, y, reference.statistics(r, None, arguments[4], arguments[7], None, None).float()


def _plain_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dx2, sums = reference.group_norm_silu_backward(*arguments)
    x, x2 = arguments[1:3]
    return _dense_like(dx, x), x.new_empty(0) if x2 is None else _dense_like(dx2, x2), sums.float()


# name: (shapes, Triton, plain torch)
_IMPLEMENTATIONS: dict[str, tuple[Any, Any, Any]] = {
    "group_norm_silu": (_fake_y, _triton, _plain),
    "group_norm_silu_forward": (_fake_forward, _triton_forward, _plain_forward),
    "group_norm_silu_backward": (_fake_backward, _triton_backward, _plain_backward),
    "group_norm_silu_parameter_gradients": (
        _fake_parameter_gradients,
        _triton_parameter_gradients,
        reference.parameter_gradients,
    ),
    "residual_group_norm_silu": (_fake_join, _triton_join, _plain_join),
    "residual_group_norm_silu_forward": (_fake_join_forward, _triton_join_forward, _plain_join_forward),
}
call = register(_library, _IMPLEMENTATIONS)

"""The plan of a sampler by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import SignFastError, first_line
from .ablation import ablation_plan
from .edm import edm_plan
from .plan import Plan
from .requests import is_time_free
from .students import few_step_plan, multistep_plan, one_step_plan, recursive_plan


def plan_of(net: Any, sampler: str, steps: int, options: Mapping[str, Any]) -> Plan:
    """The plan of a sampler by name, for a network's range of noise levels; names are checked already.

    Raises:
        SignFastError: the values of the options make no plan, or one of numbers that nothing can be made of.
    """
    try:
        plan = _plan_of(net, sampler, steps, options)
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:
        raise _refused(sampler, options, first_line(error)) from error
    if not all(map(math.isfinite, (*plan.levels, *plan.coefficients))):
        raise _refused(sampler, options, "its noise levels are not all finite")
    if not is_time_free(net) and min(plan.levels) <= 0:
        raise _refused(sampler, options, f"noise levels must be positive, not {min(plan.levels)}")
    return plan


def _refused(sampler: str, options: Mapping[str, Any], why: str) -> SignFastError:
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return SignFastError(f"sampler {sampler} cannot run with {given or 'its defaults'}: {why}")


def _plan_of(net: Any, sampler: str, steps: int, options: Mapping[str, Any]) -> Plan:
    if sampler in ("edm", "ablation"):
        make: Callable[..., Plan] = edm_plan if sampler == "edm" else ablation_plan
        levels = {"round_sigma": net.round_sigma, "net_sigma_min": net.sigma_min, "net_sigma_max": net.sigma_max}
        return make(steps, **options, **levels)
    if sampler == "one_step":
        return one_step_plan(**options)
    if sampler == "few_step":
        return few_step_plan(steps, **options)
    return recursive_plan(steps) if sampler == "recursive" else multistep_plan(options["noise_levels"])

"""How an operation picks its implementation, and how it says so when the fast one is not available.

Every operation lists its implementations from fast to slow. An implementation's ``supports`` returns None when it can
take a call, or a `Reason`. A reason that the user can mend is warned about once per operation and reason, and raised
instead when ``SIGN_FAST_STRICT=1``; a reason that lies in the call itself (say, gradients are wanted) is not.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad


@dataclass(frozen=True)
class Reason:
    """Why an implementation cannot take a call; `remedy` is empty where the user can do nothing about it."""

    why: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}" if self.remedy else self.why


class SlowPathError(RuntimeError):
    """Raised instead of falling back to a slower implementation when ``SIGN_FAST_STRICT=1``."""


class SlowPathWarning(UserWarning):
    """An operation runs on a slower implementation than this machine could offer."""


class MissingKernelError(RuntimeError):
    """No pack has the machine code that a launch needs, and SIGN_FAST_NO_JIT=1 forbids compiling it just in time."""


class NoKernelError(RuntimeError):
    """No pack has it and there is no Triton: the operator takes plain PyTorch."""


DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
NOT_FAST_DTYPE = Reason("float64 is for checking only")
COMPILING = Reason("a compiler fuses the plain form with its neighbours on the CPU")
TRANSFORMED = Reason("torch.func or forward-mode differentiation is active: plain torch is transformed")


def transformed() -> bool:
    """Whether torch.func or forward-mode AD, which the operators do not know, watches what runs outside a compiler."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


_warned: set[tuple[str, Reason]] = set()
taken: Counter[tuple[str, str]] = Counter()
"""How often each (operation, implementation) ran in this process; the tests read it."""


def fall_back(operation: str, reason: Reason) -> None:
    """Record that `operation` cannot take its fast path: silent, warn once, or raise, as the module text says."""
    if not reason.remedy:
        return
    if os.environ.get("SIGN_FAST_STRICT") == "1":
        raise SlowPathError(f"{operation}: {reason} (SIGN_FAST_STRICT=1 forbids the slower path)")
    if (operation, reason) not in _warned:
        _warned.add((operation, reason))
        warnings.warn(f"{operation} runs on its slower path: {reason}", SlowPathWarning, stacklevel=3)

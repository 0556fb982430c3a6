"""Errors whose message is meant for the person at the keyboard: one line, what is wrong and how to mend it."""

from __future__ import annotations

import operator
from typing import Any


class SignFastError(ValueError):
    """Bad input. The command line prints it as one line and exits with status 1."""


class SharedError(SignFastError):
    """One that all processes of a run raise; the command line prints the first one's."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def whole_number(value: Any, name: str) -> int:
    """value as an int.

    Raises:
        SignFastError: it is none; the line begins with `name`.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise SignFastError(f"{name} {short(value)} is not a whole number")


def short(value: object) -> str:
    """repr in one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

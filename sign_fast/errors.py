"""Errors whose message is meant for the person at the keyboard: one line, what is wrong and how to mend it."""

from __future__ import annotations


class SignFastError(ValueError):
    """Bad input. The command line prints it as one line and exits with status 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

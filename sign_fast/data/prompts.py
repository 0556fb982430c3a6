"""Prompts from a text file, one a line, or a column of a Parquet file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SignFastError, first_line, short

COLUMNS = ("prompt", "text", "caption")
"""Of a Parquet file, the first that is there."""
_PARQUET = {".parquet", ".pq"}
_TEXT = {"string", "large_string", "string_view"}  # kinds of columns


def read_prompts(path: str | os.PathLike[str], column: str | None = None) -> list[str]:
    """The prompts of a file, in its order.

    Args:
        path: a text file in UTF-8 with one prompt a line, or .parquet.
        column: of a Parquet file; None takes the first of `COLUMNS`.

    Raises:
        SignFastError: no such file, nothing in it, a blank prompt, text that is not UTF-8, or a table without the
            column.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "is not there"
        raise SignFastError(f"{file} {what}: name a file of prompts, one a line, or a .parquet")
    if file.suffix.lower() in _PARQUET:
        return _checked(_from_parquet(file, column), file, "row")
    if column is not None:
        raise SignFastError(f"{file} is no .parquet and has no columns: leave --prompt-column away")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SignFastError(f"{file} is not UTF-8 text (line {line}): save it as UTF-8") from error
    except OSError as error:
        raise SignFastError(f"cannot read {file} ({error.strerror or first_line(error)})") from error
    lines = [line.removesuffix("\r").strip() for line in text.split("\n")]  # other separators are part of a prompt
    if lines and not lines[-1]:
        lines.pop()  # what follows the last line's end
    return _checked(lines, file, "line")


def _checked(prompts: Sequence[Any], file: Path, unit: str) -> list[str]:
    blank = [i for i, prompt in enumerate(prompts, 1) if prompt is None or not str(prompt).strip()]
    if len(blank) == len(prompts):
        raise SignFastError(f"{file} holds no prompt: write one a {unit}")
    if blank:
        more = f" (and {len(blank) - 1} more)" if len(blank) > 1 else ""
        raise SignFastError(f"{file}: {unit} {blank[0]}{more} is blank, which is no prompt: remove it")
    return [str(prompt) for prompt in prompts]


def _from_parquet(file: Path, column: str | None) -> list[Any]:
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise SignFastError(f"{file} needs pyarrow: pip install 'sign-fast[text]'") from error
    try:
        schema = parquet.read_schema(file)
        wanted = COLUMNS if column is None else (column,)
        found = [name for name in wanted if name in schema.names]
        if not found:
            has = ", ".join(map(short, schema.names[:20])) or "none"
            named = " or ".join(map(repr, wanted))
            raise SignFastError(f"{file} has no column {named}: its columns are {has}; name one with --prompt-column")
        if schema.names.count(found[0]) > 1:
            raise SignFastError(f"{file} has several columns {found[0]!r}: rename or remove all but one")
        kind = schema.field(found[0]).type
        if str(kind) not in _TEXT:
            raise SignFastError(f"{file}: column {found[0]!r} is {kind}, not text: name another with --prompt-column")
        prompts: list[Any] = parquet.read_table(file, columns=[found[0]]).column(0).to_pylist()
    except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
        raise SignFastError(f"{file} is not a whole Parquet file ({first_line(error)}): copy it again") from error
    return prompts

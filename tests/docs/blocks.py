"""The code blocks of a Markdown file, and how each language of them is run.

A block is fenced. `python` is executed, all blocks of a file in one namespace; of a `diff` the new side is. In `bash`
each command is run; `text` and `json` are not code. A comment right before the fence can say otherwise:

    <!-- tested: parsed -->             options are checked, nothing is run: it would train, or needs several GPUs
    <!-- tested: dry run -->            with --dry-run
    <!-- tested: by tests/…/test_x.py -->   that test runs it: it has the same words, such as a script's name
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
_FENCE = re.compile(r"^```(\w*)$")
_DIRECTIVE = re.compile(r"^<!-- tested: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """Args: language, text, line: of the file, where the text begins; how: what a comment before it says."""

    language: str
    text: str
    line: int
    how: str


def blocks(path: Path) -> list[Block]:
    """In the file's order."""
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start, language = None, ""
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if start is None and line.startswith("```"):
            assert match and match[1], f"{path.name}:{number + 1}: a fence names its language"
            start, language = number, match[1]
        elif start is not None and line == "```":
            before = _DIRECTIVE.match(lines[start - 1]) if start else None
            found.append(Block(language, "\n".join(lines[start + 1 : number]), start + 2, before[1] if before else ""))
            start = None
    assert start is None, f"{path.name}: a fence is not closed"
    return found


def new_side(diff: str) -> str:
    """What a diff leaves."""
    kept = [line[1:] for line in diff.splitlines() if line[:1] != "-"]
    return "\n".join(line for line in kept)


def commands(text: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """(environment, words) of each command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        environment = {}
        while words and re.match(r"^[A-Z_]+=", words[0]):
            name, value = words.pop(0).split("=", 1)
            environment[name] = value
        if words:
            yield environment, words

"""What `accelerate` changed and what it left, as a table that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...kernels.dispatch import Reason


class Site(NamedTuple):
    """One place of a network.

    Args:
        name: as named_modules() gives it, after the component's in a pipeline.
        kind: what it computes.
        reason: of a changed one what it uses now; of one that was left why, and after a semicolon the remedy if any.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Found:
    """A site before it is told whether it runs on our operations: `left` is None where it does."""

    name: str
    kind: str
    uses: str
    left: Reason | None


class Acceleration:
    """What runs on sign_fast's operations; `changed` and `left` look at the networks as they are now.

    A later change by the user, such as another attention processor, shows in them.
    """

    def __init__(self, look: Callable[[], Iterable[Found]], undo: Callable[[], None]) -> None:
        self._look = look
        self._undo = undo

    @property
    def changed(self) -> list[Site]:
        """The sites that run on our operations."""
        return [Site(s.name, s.kind, s.uses) for s in self._look() if s.left is None]

    @property
    def left(self) -> list[Site]:
        """The sites that run as they did, with the reason and, where there is one, the remedy."""
        return [Site(s.name, s.kind, str(s.left)) for s in self._look() if s.left is not None]

    def restore(self) -> None:
        """Undo it: the classes and memory formats as they were. Values stay those of now, trained or not."""
        self._undo()

    def __str__(self) -> str:
        parts = [_table("changed", self.changed), _table("left", self.left)]
        return "\n\n".join(part for part in parts if part)

    def __repr__(self) -> str:
        return f"Acceleration({len(self.changed)} changed, {len(self.left)} left)"


def _table(title: str, sites: list[Site]) -> str:
    """Sites of one kind and reason in one row."""
    if not sites:
        return f"{title}: nothing"
    groups: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        groups.setdefault((site.kind, site.reason), []).append(site.name)
    rows = [(str(len(names)), kind, names[0], reason) for (kind, reason), names in groups.items()]
    headings = ("sites", "kind", "first", "how" if title == "changed" else "why")
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(3)]
    lines = [
        "  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), row[3]])
        for row in (headings, *rows)
    ]
    return "\n".join([f"{title}: {len(sites)} sites", *lines])

"""The GPU architectures that machine code is built for, as SIGN_FAST_ARCHS names them.

Stands alone: setup.py loads this file by its path, before anything is installed.

What runs where:

- Machine code for compute capability X.Y below 9.0 runs on X.Z with Z >= Y: that of 8.0 on 8.6 and 8.9 too.
- From 9.0 on Triton emits architecture-specific code (``sm_90a``), which runs on exactly that compute capability.
- PTX, NVIDIA's assembly text, is compiled by the driver when it is loaded. That of 8.x goes forward to every newer GPU;
  that of 9.0 and later is architecture-specific too and goes nowhere else, so that of 8.9 is kept in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OLDEST = 80
KNOWN = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)  # those that the assembler of Triton 3.7 knows
SPECIFIC = 90
"""From this number on Triton's code is architecture-specific."""
FAMILIES = {
    "ampere": "8.0 8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "blackwell+tegra": "11.0",
}
"""The names that torch's TORCH_CUDA_ARCH_LIST knows, with what they stand for there."""
_TOO_OLD = ("kepler", "maxwell", "pascal", "volta", "turing")
_EXAMPLE = 'write it as "8.0;9.0" or "8.0;8.6+PTX"'


@dataclass(frozen=True, order=True)
class Architecture:
    """One architecture to build for.

    Args:
        number: 90 for compute capability 9.0, 120 for 12.0.
        ptx: whether PTX is kept beside the machine code.
    """

    number: int
    ptx: bool = False

    @property
    def capability(self) -> str:
        """ "9.0" for number 90."""
        return f"{self.number // 10}.{self.number % 10}"

    def __str__(self) -> str:
        return self.capability + ("+PTX" if self.ptx else "")

    def runs_on(self, number: int) -> bool:
        """Whether its machine code, without PTX, runs on a GPU of the compute capability with this number."""
        if self.number >= SPECIFIC:
            return number == self.number
        return number // 10 == self.number // 10 and number >= self.number


def parse(text: str) -> tuple[Architecture, ...]:
    """The architectures of a list such as "8.0;9.0+PTX": sorted, each once, PTX where any mention has it.

    The separators are ``;``, ``,`` and space. An entry is "9.0", "9.0a", "90", "sm_90" or one of torch's family names
    (Ampere, Ada, Hopper, Blackwell), each with "+PTX" or without, in any case; this takes in the syntax of
    TORCH_CUDA_ARCH_LIST. "9.0a" is the same as "9.0": see above.

    Raises:
        ValueError: nothing is named, or an entry is unknown or older than 8.0; one line with an example.
    """
    ptx: dict[int, bool] = {}
    for entry in re.split(r"[;,\s]+", text.strip(";, \t\r\n")):
        for number, wanted in _expand(entry):
            ptx[number] = ptx.get(number, False) or wanted
    return tuple(Architecture(number, ptx[number]) for number in sorted(ptx))


def _expand(entry: str) -> list[tuple[int, bool]]:
    name, ptx = entry.lower(), False
    if name.endswith("+ptx"):
        name, ptx = name[:-4], True
    if name in FAMILIES:
        members = [member for part in FAMILIES[name].split() for member in _expand(part)]
        return [*members[:-1], (members[-1][0], members[-1][1] or ptx)]
    if name.removesuffix("+tegra").split("+")[0] in _TOO_OLD:
        raise ValueError(
            f'{entry!r} is older than 8.0, the oldest architecture that is built for: name newer ones, as in "8.0;9.0"'
        )
    found = re.fullmatch(r"(\d+)\.(\d)[af]?|(?:sm_?|compute_?)?(\d{2,3})[af]?", name)
    if found is None:
        told = "no architecture is named" if not entry else f"{entry!r} is not an architecture"
        if name == "native":  # torch looks at the GPU that is there
            told = "'native' needs a GPU where it is built"
        raise ValueError(f"{told}: {_EXAMPLE}")
    number = int(found[3] or found[1] + found[2])
    if number < OLDEST:
        raise ValueError(
            f'{entry!r} is older than 8.0, the oldest architecture that is built for: name newer ones, as in "8.0;9.0"'
        )
    if number not in KNOWN:
        names = ", ".join(Architecture(known).capability for known in KNOWN)
        raise ValueError(f"{entry!r} is not one of the known architectures {names}: {_EXAMPLE}")
    return [(number, ptx)]

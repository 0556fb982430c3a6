"""The platform tag that a wheel may honestly carry, read from its shared libraries.

Stands alone: setup.py loads this file by its path. A manylinux tag promises that the files need nothing newer than its
glibc, and no library that such a system need not have; torch's own libraries come with torch.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PLAIN = "linux_x86_64"
_SYSTEM = re.compile(r"(lib(c|m|dl|rt|util|pthread)\.so\.\d+|lib(gcc_s|stdc\+\+)\.so\.\d+|ld-linux-x86-64\.so\.2)")
_TORCH = re.compile(r"lib(torch|c10|gomp)[\w-]*\.so[.\d]*")
# The newest version of the compiler's libraries in each manylinux policy, with the policy's glibc. Source: the policies
# of PEP 600 as auditwheel keeps them.
_POLICIES: dict[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "GLIBCXX": (
        ((3, 4, 8), 5), ((3, 4, 13), 12), ((3, 4, 19), 17), ((3, 4, 22), 24), ((3, 4, 24), 27),
        ((3, 4, 28), 31), ((3, 4, 29), 34), ((3, 4, 30), 35), ((3, 4, 33), 39),
    ),
    "CXXABI": (
        ((1, 3, 1), 5), ((1, 3, 3), 12), ((1, 3, 7), 17), ((1, 3, 10), 24), ((1, 3, 11), 27),
        ((1, 3, 12), 31), ((1, 3, 13), 34), ((1, 3, 15), 39),
    ),
    "GCC": (((4, 2, 0), 5), ((4, 3, 0), 12), ((4, 8, 0), 17), ((7, 0, 0), 27), ((12, 0, 0), 35), ((14, 0, 0), 39)),
}  # fmt: skip
_NAMED = {"CXXABI_TM_1": 17, "CXXABI_FLOAT128": 24, "GLIBC_ABI_DT_RELR": 36}


@dataclass(frozen=True)
class Needs:
    """Names of the libraries a shared library needs, and versions such as "GLIBC_2.32" of the system's symbols."""

    libraries: frozenset[str]
    versions: frozenset[str]


def needs(file: Path) -> Needs:
    """Reads a 64-bit little-endian ELF file.

    Raises:
        ValueError: it is none.
    """
    data = file.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{file.name} is not a 64-bit ELF file")
    try:
        return _read(data)
    except (struct.error, KeyError, IndexError, StopIteration) as error:
        raise ValueError(f"{file.name} is a damaged ELF file") from error


def _read(data: bytes) -> Needs:
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    loaded = [(address, offset, length) for kind, _, offset, address, _, length in segments if kind == 1]
    entries = next(((offset, length) for kind, _, offset, _, _, length in segments if kind == 2), (0, 0))
    dynamic = list(struct.iter_unpack("<QQ", data[entries[0] : entries[0] + entries[1] // 16 * 16]))
    values = dict(dynamic)

    def offset_of(address: int) -> int:
        return next(address - start + offset for start, offset, length in loaded if start <= address < start + length)

    def text(at: int) -> str:
        start = strings + at
        return data[start : data.index(b"\0", start)].decode()

    def versions() -> Iterator[str]:
        at = offset_of(values[0x6FFFFFFE])
        for _ in range(values[0x6FFFFFFF]):
            _, names, library, first, further = struct.unpack_from("<HHIII", data, at)
            entry = at + first
            of_torch = _TORCH.fullmatch(text(library))
            for _ in range(names):
                _, _, _, name, step = struct.unpack_from("<IHHII", data, entry)
                if not of_torch:
                    yield text(name)
                entry += step
            at += further

    strings = offset_of(values[5]) if dynamic else 0
    libraries = frozenset(text(value) for kind, value in dynamic if kind == 1)
    return Needs(libraries, frozenset(versions()) if 0x6FFFFFFF in values else frozenset())


def _glibc(version: str) -> int | None:
    """X of the first manylinux_2_X whose systems have the symbol version; None where none is known to."""
    if version in _NAMED:
        return _NAMED[version]
    family, _, number = version.partition("_")
    if not re.fullmatch(r"\d+(\.\d+)+", number):
        return None
    parts = tuple(int(part) for part in number.split("."))
    if family == "GLIBC":
        return parts[1] if parts[0] == 2 else None
    return next((glibc for newest, glibc in _POLICIES.get(family, ()) if parts <= newest), None)


def obstacle(files: Iterable[Path]) -> str | None:
    """Why these shared libraries together may carry no manylinux tag; None where they may."""
    for file in files:
        found = needs(file)
        for library in sorted(found.libraries):
            if not (_SYSTEM.fullmatch(library) or _TORCH.fullmatch(library)):
                return f"{file.name} needs {library}"
        for version in sorted(found.versions):
            if _glibc(version) is None:
                return f"{file.name} needs {version}, which no manylinux policy has"
    return None


def platform_tag(files: Iterable[Path]) -> str:
    """The tag by the newest symbol version that any of the libraries needs: manylinux_2_X_x86_64, or linux_x86_64."""
    files = list(files)
    if not files or obstacle(files) is not None:
        return PLAIN
    glibc = [_glibc(version) or 0 for file in files for version in needs(file).versions]
    return f"manylinux_2_{max([5, *glibc])}_x86_64"

"""What a machine-code file (cubin, an ELF file) says of itself: its GPU architecture, kernels and their parameters."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_CUDA = 190  # e_machine
_SYMBOLS = 2  # sh_type
_FUNCTION = 2  # type of a symbol
_PARAMETER = 0x17  # attribute of .nv.info: one parameter of a kernel
_REGISTERS = 0x2F  # attribute of .nv.info: symbol, registers of its threads
_SYMBOL_BYTES = 24
_SIZED = 4  # an attribute's format: two bytes of size, then the value; the other formats are four bytes in all
_SPLIT_ABI = 8  # from this version of the ELF ABI on, the architecture is in the flags' second byte


class _Section(NamedTuple):
    name: str
    kind: int
    link: int
    content: bytes


def _check(cubin: bytes) -> None:
    if cubin[:5] != b"\x7fELF\x02" or len(cubin) < 64 or struct.unpack_from("<H", cubin, 18)[0] != _CUDA:
        raise ValueError("not CUDA machine code: no ELF file for NVIDIA GPUs")


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def _sections(cubin: bytes) -> list[_Section]:
    _check(cubin)
    try:
        segments, start = struct.unpack_from("<2Q", cubin, 32)
        segment_size, segment_count, size, count, names = struct.unpack_from("<5H", cubin, 54)
        headers = [struct.unpack_from("<2I4Q2I", cubin, start + i * size) for i in range(count)]
        no_bits = 8  # takes no room in the file
        contents = [b"" if kind == no_bits else cubin[at : at + n] for _, kind, _, _, at, n, _, _ in headers]
        end = max(at + n for _, kind, _, _, at, n, _, _ in headers if kind != no_bits)
        if max(end, segments + segment_size * segment_count) > len(cubin):
            raise ValueError
        return [_Section(_text(contents[names], h[0]), h[1], h[6], c) for h, c in zip(headers, contents, strict=True)]
    except (struct.error, ValueError, IndexError) as error:
        raise ValueError("CUDA machine code that is cut off or damaged") from error


def architecture(cubin: bytes) -> int:
    """The GPU architecture that machine code is for: 90 for compute capability 9.0.

    Raises:
        ValueError: it is no CUDA machine code.
    """
    _check(cubin)
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return flags >> 8 & 0xFF if cubin[8] >= _SPLIT_ABI else flags & 0xFF


def symbols(cubin: bytes) -> list[str]:
    """The names of the functions, kernels among them, that machine code defines.

    Raises:
        ValueError: it is no CUDA machine code, or damaged.
    """
    sections = _sections(cubin)
    found = []
    for section in sections:
        if section.kind == _SYMBOLS:
            for name, info, _, place, _, _ in struct.iter_unpack("<I2BH2Q", section.content):
                if info & 0xF == _FUNCTION and place != 0:
                    found.append(_text(sections[section.link].content, name))
    return found


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(content):
        form, attribute, size = struct.unpack_from("<2BH", content, at)
        at += 4
        if form == _SIZED:
            yield attribute, content[at : at + size]
            at += size


def parameter_sizes(cubin: bytes, symbol: str) -> bytes:
    """The size in bytes of each parameter of a kernel, in order, one byte each; Triton's scratch pointers come last.

    Raises:
        ValueError: it is no CUDA machine code, damaged, or without that kernel.
    """
    content = next((s.content for s in _sections(cubin) if s.name == f".nv.info.{symbol}"), None)
    if content is None:
        raise ValueError(f"the machine code has no kernel {symbol}")
    sizes: dict[int, int] = {}
    for attribute, value in _attributes(content):
        if attribute == _PARAMETER:
            _, ordinal, _, packed = struct.unpack("<I2HI", value)
            sizes[ordinal] = packed >> 18
    if sorted(sizes) != list(range(len(sizes))):
        raise ValueError(f"the machine code does not name all parameters of {symbol}")
    return bytes(sizes[ordinal] for ordinal in range(len(sizes)))


def registers(cubin: bytes, symbol: str) -> int:
    """The registers that a thread of a kernel takes.

    Raises:
        ValueError: it is no CUDA machine code, damaged, or without that kernel.
    """
    sections = _sections(cubin)
    table = next((s for s in sections if s.kind == _SYMBOLS), None)
    for section in sections:
        if table is None or section.name != ".nv.info":
            continue
        for attribute, value in _attributes(section.content):
            if attribute == _REGISTERS:
                number, count = struct.unpack("<2I", value)
                (name,) = struct.unpack_from("<I", table.content, number * _SYMBOL_BYTES)
                if _text(sections[table.link].content, name) == symbol:
                    return int(count)
    raise ValueError(f"the machine code has no kernel {symbol}")

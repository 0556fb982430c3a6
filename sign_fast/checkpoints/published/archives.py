"""What `torch.save` writes, its two formats read without torch: the pickle by `Machine`, the storages as they lie."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable
from typing import Any

from .machine import Budget, Machine
from .records import RefusedError, Storage, StorageType, say

ZIP_MAGIC = b"PK\x03\x04"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# how a file of the old format begins: PROTO, then the number as LONG1
LEGACY_MAGIC = b"\x8a\x0a" + _MAGIC_NUMBER.to_bytes(10, "little")

Table = dict[tuple[str, str], Any]


def read(data: memoryview, table: Table, budget: Budget) -> Any:
    """The value in the bytes of a `torch.save`, zip or legacy; its storages are views of `data`.

    Raises:
        RefusedError: neither, damaged, or it names what is not on the table.
    """
    if bytes(data[:4]) == ZIP_MAGIC:
        return _read_zip(data, table, budget)
    return _read_legacy(data, table, budget)


class _Storages:
    """The storages that a pickle names by persistent ids; `fill` gives each its bytes."""

    def __init__(self, fields: int) -> None:
        self.fields = fields  # of a persistent id in this format
        self.named: dict[str, Storage] = {}

    def load(self, identity: Any) -> Any:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class of modules, known by its name, and its source, which nobody needs
        if type(identity) is not tuple or len(identity) != self.fields or identity[0] != "storage":
            raise RefusedError("has a persistent id that is no storage's")
        _, kind, key, _, numel, *view = identity  # where it lay, e.g. "cuda:0", does not matter
        if not isinstance(kind, StorageType) or type(key) is not str or type(numel) is not int or numel < 0:
            raise RefusedError("has a storage without type, name and size")
        if view not in ([], [None]):
            raise RefusedError("has a storage that is a view of another, as torch before 0.4 wrote them")
        known = self.named.setdefault(key, Storage(kind, numel))
        if known.type != kind or known.numel != numel:
            raise RefusedError(f"names storage {say(key)} twice, differently")
        return known

    def fill(self, key: str, data: memoryview) -> None:
        storage = self.named[key]
        if len(data) != storage.numel * storage.type.itemsize:
            raise RefusedError(f"has a storage of {len(data):,} bytes that claims {say(storage.numel)} elements")
        storage.data = data


def _read_legacy(data: memoryview, table: Table, budget: Budget) -> Any:
    """Pickles of a magic number, of a version, of the writing system, of the value and of the storages' names; then
    each storage, its size in front."""
    plain: Table = {}
    machine = Machine(data, plain, budget)

    def next_value(table: Table, persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal machine
        machine = Machine(data, table, budget, persistent, machine.at)
        return machine.run()

    storages = _Storages(fields=6)
    if next_value(plain) != _MAGIC_NUMBER or next_value(plain) != _PROTOCOL:
        raise RefusedError("has a storage that is not of torch.save's making")
    system = next_value(plain)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("has storages of a big-endian machine")
    value = next_value(table, storages.load)
    keys = next_value(plain)
    if (
        type(keys) is not list
        or sorted(filter(_is_text, keys)) != sorted(storages.named)
        or len(keys) != len(storages.named)
    ):
        raise RefusedError("is damaged: a list of storages does not name those that are used")
    at = machine.at
    for key in keys:
        if at + 8 > len(data):
            raise RefusedError("is truncated: fetch it again")
        (numel,) = struct.unpack("<q", data[at : at + 8])
        storage = storages.named[key]
        end = at + 8 + storage.numel * storage.type.itemsize
        if numel != storage.numel or end > len(data):
            raise RefusedError(f"has a storage that claims {say(storage.numel)} elements and is of another size")
        storages.fill(key, data[at + 8 : end])
        at = end
    if at != len(data):
        raise RefusedError("is damaged: more follows its storages")
    return value


def _is_text(value: Any) -> bool:
    return type(value) is str


def _read_zip(data: memoryview, table: Table, budget: Budget) -> Any:
    members = zip_members(data, budget)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise RefusedError("is a zip archive without the data.pkl of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    if bytes(members.get(f"{root}byteorder", b"little")[:16]) != b"little":
        raise RefusedError("has storages of a big-endian machine")
    storages = _Storages(fields=5)
    machine = Machine(members[pickles[0]], table, budget, storages.load)
    value = machine.run()
    if machine.at != len(members[pickles[0]]):
        raise RefusedError("is damaged: more follows its pickle")
    for key in storages.named:
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise RefusedError(f"lacks its storage {say(key)}")
        storages.fill(key, member)
    return value


_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY = struct.Struct("<4s6H3I5H2I")  # central directory
_LOCAL = struct.Struct("<4s5H3I2H")


def zip_members(data: memoryview, budget: Budget) -> dict[str, memoryview]:
    """Name -> content of a zip archive whose members are stored, not compressed, as torch writes them.

    Raises:
        RefusedError: compressed or encrypted members, names that are not plain or come twice, members that overlap or
            reach out of the file, checksums that do not fit.
    """
    count, start, size = _directory(data)
    budget.spend_operations(count)
    members: dict[str, memoryview] = {}
    spans: list[tuple[int, int]] = []
    at = start
    for _ in range(count):
        name, begin, length, crc, at = _entry(data, at, start + size)
        if name in members:
            raise RefusedError(f"is an archive with two files named {say(name)}")
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
            raise RefusedError(f"is an archive with the unsafe file name {say(name)}")
        first = _content_start(data, name, begin, length, start)
        content = data[first : first + length]
        budget.spend_bytes(length)
        if crc and zlib.crc32(content) != crc:  # 0 where torch was told to write none
            raise RefusedError(f"is damaged: the checksum of {say(name)} does not fit")
        spans.append((begin, first + length))
        members[name] = content
    if at != start + size:
        raise RefusedError("is damaged: its archive's directory is of another size")
    spans.sort()
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        raise RefusedError("is an archive whose files overlap")
    return members


def _unpack(layout: struct.Struct, data: memoryview, at: int, end: int) -> tuple[Any, ...]:
    if at < 0 or at + layout.size > end:
        raise RefusedError("is truncated: fetch it again")
    return layout.unpack(data[at : at + layout.size])


def _directory(data: memoryview) -> tuple[int, int, int]:
    """(number of entries, offset, size) of the central directory."""
    layout = struct.Struct("<4s4H2IH")
    at = len(data) - layout.size
    magic, disk, first, here, count, size, start, comment = _unpack(layout, data, at, len(data))
    if magic != _END or comment:
        raise RefusedError("is truncated, or no archive of torch.save's: fetch it again")
    if disk == first == 0xFFFF or 0xFFFF in (here, count) or 0xFFFFFFFF in (size, start):
        locator, layout64 = struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
        magic, _, where, _ = _unpack(locator, data, at - locator.size, len(data))
        if magic != _LOCATOR64:
            raise RefusedError("is damaged: its archive has no directory")
        at = where
        magic, _, _, _, disk, first, here, count, size, start = _unpack(layout64, data, at, len(data))
        if magic != _END64:
            raise RefusedError("is damaged: its archive has no directory")
    if disk or first or here != count or start + size > at or count * _ENTRY.size > size:
        raise RefusedError("is damaged: its archive's directory does not fit")
    return count, start, size


def _entry(data: memoryview, at: int, end: int) -> tuple[str, int, int, int, int]:
    """(name, offset of the local header, size, checksum, offset of the next) of a directory's entry."""
    magic, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, _, _, _, header = _unpack(
        _ENTRY, data, at, end
    )
    at += _ENTRY.size
    if magic != b"PK\x01\x02" or at + name + extra + comment > end:
        raise RefusedError("is damaged: its archive's directory does not fit")
    try:
        text = str(data[at : at + name], "utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError("is an archive with a file name that is no text") from error
    if 0xFFFFFFFF in (packed, size, header):
        packed, size, header = _wide(data[at + name : at + name + extra], packed, size, header)
    if method or flags & 1 or packed != size:
        raise RefusedError(f"is an archive whose {say(text)} is compressed or encrypted, which torch.save never does")
    return text, header, size, crc, at + name + extra + comment


def _wide(extra: memoryview, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """Zip64's sizes, in the order in which the narrow ones are full."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<2H", extra[at : at + 4])
        if kind == 1:
            values = [v for (v,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            wide = []
            for narrow in (size, packed, header):
                wide.append(values.pop(0) if narrow == 0xFFFFFFFF and values else narrow)
            return wide[1], wide[0], wide[2]
        at += 4 + length
    return packed, size, header


def _content_start(data: memoryview, name: str, header: int, size: int, end: int) -> int:
    magic, _, _, _, _, _, _, _, _, name_size, extra = _unpack(_LOCAL, data, header, end)
    begin = header + _LOCAL.size + name_size + extra
    if magic != ZIP_MAGIC or bytes(data[header + _LOCAL.size :][:name_size]) != name.encode():
        raise RefusedError(f"is damaged: its archive's {say(name)} is not where the directory says")
    if begin + size > end:
        raise RefusedError(f"is an archive whose {say(name)} reaches out of it")
    return begin

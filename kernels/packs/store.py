"""Packs: machine code of many kernel variants for one architecture, one zip file each.

`index.json` says what the other members are: for every variant its key, member, entry symbol, launch data, signature
and what it takes of the GPU. A member is named by the hash of its content and its entry, which is checked before it is
used. Nothing in a pack is executed but by the GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
FOLDER = Path(__file__).parent
"""Where a wheel's packs are."""
_MOST_BYTES = 256 << 20  # of an unpacked member: what claims more is no kernel
_UNREADABLE = (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError, RecursionError)
_DATE = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal packs are equal files


class DamagedPackError(RuntimeError):
    """A pack is not what it should be; the message names the file."""


@dataclass(frozen=True)
class Variant:
    """One kernel, compiled for one specialisation.

    Args:
        key: see `key.key`.
        member: its file in the pack, "<sha256>.cubin" or ".ptx", see `seal`.
        symbol: the entry's name in it.
        num_warps, shared_bytes: of the launch.
        parameter_sizes: bytes of each parameter of the machine code, Triton's scratch pointers included.
        registers: of a thread; of PTX, those of the machine code that ptxas made of it for the pack's architecture.
        signature: Triton's type of each argument that is passed, by name.
    """

    key: str
    member: str
    symbol: str
    num_warps: int
    shared_bytes: int
    parameter_sizes: tuple[int, ...]
    registers: int
    signature: Mapping[str, str]


@dataclass(frozen=True)
class Kernel:
    """What a launcher must know of a kernel.

    Args:
        source: hash of the files that it was made from, see `source_hash`.
        parameters: rows of `key.parameters`, without a default where there is none.
    """

    source: str
    parameters: tuple[tuple[Any, ...], ...]


@cache
def source_hash(kernel: str) -> str:
    """SHA-256 of what the machine code of a kernel such as "attention.triton_kernels.forward" is made from.

    That are the files of its operation with @triton.jit functions, which call each other's, and reference.py, whose
    constants they read. Triton is not imported; "" for what is no kernel of this package.
    """
    folder = Path(__file__).parents[1] / kernel.split(".", 1)[0]
    sources = sorted([*folder.glob("triton_*.py"), *folder.glob("reference.py")])
    digest = hashlib.sha256()
    for source in sources:
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)}\n".encode() + content)
    return digest.hexdigest() if sources else ""


class Pack:
    """A pack file; its index is read at first use.

    Args:
        path: "sm_90.zip", or "ptx_89.zip" for PTX.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    @cached_property
    def _facts(self) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                facts: dict[str, Any] = json.loads(_member(archive, "index.json"))
            if facts["format"] != FORMAT:
                raise DamagedPackError(f"{self.path} has format {facts['format']}, this is for {FORMAT}: build it anew")
            kinds = {"architecture": int, "kind": str, "triton": str, "ptxas": str, "networks": list}
            for name, kind in {**kinds, "kernels": dict, "variants": dict}.items():
                if type(facts[name]) is not kind:
                    raise TypeError(f"its {name} is of another type")
            if facts["kind"] not in ("cubin", "ptx"):
                raise ValueError(f"its kind is {facts['kind']!r}")
        except _UNREADABLE as error:
            raise DamagedPackError(f"{self.path} cannot be read: {error}") from error
        return facts

    @property
    def architecture(self) -> int:
        """90 for compute capability 9.0."""
        return int(self._facts["architecture"])

    @property
    def kind(self) -> Literal["cubin", "ptx"]:
        """Machine code, or PTX for newer GPUs."""
        return self._facts["kind"]  # type: ignore[no-any-return]

    @property
    def triton(self) -> str:
        """The version of Triton that compiled it."""
        return str(self._facts["triton"])

    @property
    def ptxas(self) -> str:
        """The CUDA version of the assembler that made the machine code, which a driver must not be much older than."""
        return str(self._facts["ptxas"])

    @property
    def networks(self) -> list[str]:
        """The networks whose calls it is for."""
        return list(self._facts["networks"])

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """By name.

        Raises:
            DamagedPackError: the index has none that make sense.
        """
        try:
            return {name: _kernel(row) for name, row in self._facts["kernels"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DamagedPackError(f"{self.path} has no proper list of kernels") from error

    @cached_property
    def current(self) -> dict[str, Kernel]:
        """The kernels whose sources are the installed ones."""
        return {name: kernel for name, kernel in self.kernels.items() if kernel.source == (source_hash(name) or None)}

    @property
    def keys(self) -> list[str]:
        """Of all variants."""
        return list(self._facts["variants"])

    def find(self, key: str) -> Variant | None:
        """The variant with that key, if it is there.

        Raises:
            DamagedPackError: the index has a variant of that key that makes no sense.
        """
        row = self._facts["variants"].get(key)
        if row is None:
            return None
        try:
            variant = Variant(key, **{**row, "parameter_sizes": tuple(map(int, row["parameter_sizes"]))})
            numbers = (variant.num_warps, variant.shared_bytes, variant.registers)
            if not all(isinstance(value, str) for value in (variant.member, variant.symbol)) or not all(
                type(value) is int and value >= 0 for value in (*numbers, *variant.parameter_sizes)
            ):
                raise TypeError
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedPackError(f"{self.path} has no proper entry for {key}") from error
        return variant

    def image(self, variant: Variant) -> bytes:
        """The variant's machine code, or PTX.

        Raises:
            DamagedPackError: it is missing, or it or the variant's entry is not what was written.
        """
        try:
            image = _member(self._archive(), variant.member)
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, EOFError) as error:
            raise DamagedPackError(f"{self.path}: {variant.member} cannot be read: {error}") from error
        if seal(variant, image) != variant.member.partition(".")[0]:
            raise DamagedPackError(f"{self.path}: {variant.member} or its entry is damaged, the SHA-256 is another")
        return image

    def _archive(self) -> zipfile.ZipFile:
        """Open as long as the process; a forked one opens its own, which reads at a place of its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]


def seal(variant: Variant, image: bytes) -> str:
    """SHA-256 of what a launch takes of a variant: all of its entry but the member's name, and the image."""
    row = {name: value for name, value in asdict(variant).items() if name != "member"}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode() + b"\0" + image).hexdigest()


def _kernel(row: dict[str, Any]) -> Kernel:
    parameters = ((str(name), *map(bool, facts)) for name, *facts in row["parameters"])
    return Kernel(row["source"], tuple(parameters))


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > _MOST_BYTES:
        raise ValueError(f"{name} claims {info.file_size} bytes")
    try:
        return archive.read(info)
    except Exception as error:  # zlib.error and what else broken bytes lead to
        raise ValueError(str(error)) from error


def write_pack(
    path: Path,
    architecture: int,
    kind: Literal["cubin", "ptx"],
    triton: str,
    ptxas: str,
    networks: Iterable[str],
    kernels: Mapping[str, Kernel],
    variants: Iterable[tuple[Variant, bytes]],
) -> None:
    """Write a pack; equal contents give equal bytes. The file appears when it is complete."""
    rows, images = {}, {}
    for variant, image in sorted(variants, key=lambda entry: entry[0].key):
        row = asdict(variant)
        rows[row.pop("key")] = row
        images[variant.member] = image
    facts = {
        "format": FORMAT,
        "architecture": architecture,
        "kind": kind,
        "triton": triton,
        "ptxas": ptxas,
        "networks": list(networks),
        "kernels": {name: asdict(kernels[name]) for name in sorted(kernels)},
        "variants": rows,
    }
    members = {"index.json": json.dumps(facts, separators=(",", ":")).encode()} | dict(sorted(images.items()))
    partial = path.with_suffix(".partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            for name, content in members.items():
                info = zipfile.ZipInfo(name, _DATE)
                info.compress_type, info.external_attr = zipfile.ZIP_LZMA, 0o644 << 16  # a fifth less than deflated
                archive.writestr(info, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def packs_in(folder: Path) -> list[Pack]:
    """The packs of a folder, in the order of their names."""
    return [Pack(path) for path in sorted(folder.glob("*.zip"))]

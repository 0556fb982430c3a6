"""A folder of images with captions: a .txt beside each image, or the Hub's metadata.jsonl or metadata.csv."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..errors import SignFastError, first_line, short
from .prompts import COLUMNS

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_TABLES = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"


class ImageTextFolder:
    """Images of any size, in the order of their names, with a caption each.

    Captions are those of metadata.jsonl or metadata.csv (columns "file_name" and "text", "prompt" or "caption"), as the
    Hub's image folders have them, and without such a table those of the .txt files of the images' names.

    Args:
        path: the folder, searched with its subfolders.

    Raises:
        SignFastError: no such folder, no image in it, an image without a caption, or a table that cannot be read or
            that names files outside of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is a file" if self.path.is_file() else "is not there"
            raise SignFastError(f"{self.path} {what}: name a folder of images with captions")
        tables = [self.path / name for name in _TABLES if (self.path / name).is_file()]
        if len(tables) > 1:
            raise SignFastError(f"{self.path} holds {_TABLES[0]} and {_TABLES[1]}: keep one of them")
        captions = self._from_table(tables[0]) if tables else self._from_files()
        self.names = sorted(captions)
        self.captions = [captions[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def _images(self) -> list[str]:
        found = [p for p in self.path.rglob("*") if p.suffix.lower() in _ENDINGS and p.is_file()]
        names = [p.relative_to(self.path).as_posix() for p in found]
        if not names:
            raise SignFastError(f"{self.path} holds no image ({', '.join(sorted(_ENDINGS))})")
        return names

    def _from_files(self) -> dict[str, str]:
        names = sorted(self._images())
        lacking = [name for name in names if not (self.path / name).with_suffix(".txt").is_file()]
        if lacking:
            raise SignFastError(
                f"{self.path}: {lacking[0]} has no caption ({len(lacking)} of {len(names)} images lack one): put a "
                f".txt of its name beside it, or a {_TABLES[0]} into the folder"
            )
        return {name: self._caption(name, (self.path / name).with_suffix(".txt")) for name in names}

    def _caption(self, name: str, file: Path) -> str:
        try:
            return _checked(file.read_text(encoding="utf-8-sig"), f"{self.path}: {name}")
        except (OSError, UnicodeDecodeError) as error:
            raise SignFastError(f"{file} is not readable as UTF-8 text ({first_line(error)}): mend it") from error

    def _from_table(self, table: Path) -> dict[str, str]:
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file) if table.suffix == ".csv" else _json_rows(file))
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise SignFastError(f"{table} cannot be read ({first_line(error)}): mend it") from error
        images, captions = set(self._images()), {}
        for number, row in enumerate(rows, 1):
            where = f"{table}: row {number}"
            columns = [c for c in ("text", *COLUMNS) if isinstance(row, dict) and isinstance(row.get(c), str)]
            if not isinstance(row, dict) or not isinstance(row.get(_FILE), str) or not columns:
                raise SignFastError(f"{where} must have {_FILE} and a text: its columns are {_FILE} and text")
            name = Path(os.path.normpath(row[_FILE])).as_posix()
            if name.startswith("..") or Path(name).is_absolute():
                raise SignFastError(f"{where} names {short(row[_FILE])}, which is outside of the folder: remove it")
            if name not in images:
                raise SignFastError(f"{where} names {short(row[_FILE])}, which is no image of the folder: remove it")
            captions[name] = _checked(row[columns[0]], where)
        lacking = sorted(images - captions.keys())
        if lacking:
            raise SignFastError(
                f"{table} has no row for {lacking[0]} ({len(lacking)} of {len(images)} images lack one): add it"
            )
        return captions

    def image(self, index: int, size: int) -> npt.NDArray[np.uint8]:
        """(3, size, size): the middle square, scaled.

        Raises:
            SignFastError: it is not readable as an image.
        """
        name = self.names[index]
        try:
            with Image.open(self.path / name) as opened:
                picture = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise SignFastError(
                f"{self.path}: {name} is not a readable image ({first_line(error)}): mend or remove it"
            ) from error
        (width, height), side = picture.size, min(picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        # cut before it is scaled: of a narrow strip the other way would make a picture of gigabytes
        cut = picture.crop((left, top, left + side, top + side))
        scaled = cut.resize((size, size), Image.Resampling.LANCZOS)  # a copy where it is of that size
        return np.ascontiguousarray(np.asarray(scaled).transpose(2, 0, 1))

    def fingerprint(self) -> list[tuple[str, int]]:
        """Names and sizes of the files."""
        return [(name, (self.path / name).stat().st_size) for name in self.names]


def _json_rows(lines: Iterable[str]) -> list[object]:
    return [json.loads(line) for line in lines if line.strip()]


def _checked(caption: str, where: str) -> str:
    text = " ".join(caption.split())
    if not text:
        raise SignFastError(f"{where}: the caption is blank: write one, or remove the image")
    return text

"""Tensors of many rows on disk: written in shards, each whole or absent, and read row by row in constant memory."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...checkpoints.atomic import make_folder, write_atomically, write_text
from ...errors import SignFastError, first_line
from ...training.processes import place, raised_together

_INDEX = "index.json"
_FORMAT = "sign_fast rows 1"
_OPEN = 64  # shards that are mapped at a time
Made = dict[str, Tensor]


def key_of(facts: Any, *texts: Sequence[str]) -> str:
    """A hash of facts that JSON can hold, and of lists of texts."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for text in texts:
        found.update(f"\n{len(text)}".encode())
        for line in text:
            encoded = line.encode("utf-8", "surrogatepass")
            found.update(f"\n{len(encoded)} ".encode())
            found.update(encoded)
    return found.hexdigest()


class Rows:
    """Rows of a folder that `write_rows` has filled, mapped and not loaded.

    Args:
        folder: of the rows.

    Raises:
        SignFastError: it does not hold them whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            if index["format"] != _FORMAT:
                raise ValueError(f"its format is {index['format']}")
            self.count, self.shard_rows = int(index["count"]), int(index["shard_rows"])
            self.shapes = {str(name): tuple(shape) for name, shape in index["shapes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SignFastError(
                f"{folder / _INDEX} is damaged ({first_line(error)}): remove {folder}, it is made again"
            ) from error
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Sequence[int]) -> Made:
        """Those rows of every tensor, on the CPU."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for row in rows:
            shard, at = divmod(int(row), self.shard_rows)
            file = self._shard(shard)
            try:
                for name, found in parts.items():
                    found.append(file.get_slice(name)[at : at + 1])
            except (SafetensorError, OSError) as error:
                raise _damaged(self.folder / _name(shard), error) from error
        return {name: torch.cat(found) for name, found in parts.items()}

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)
            path = self.folder / _name(number)
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
        self._open.move_to_end(number)
        return self._open[number]


def _damaged(path: Path, error: Exception) -> SignFastError:
    return SignFastError(f"{path} is damaged ({first_line(error)}): remove it, it is made again")


def _name(shard: int) -> str:
    return f"rows-{shard:05d}.safetensors"


def write_rows(
    folder: Path,
    count: int,
    make: Callable[[int, int], Made],
    device: torch.device,
    shard_rows: int = 1024,
    done: Callable[[int], None] = lambda rows: None,
) -> None:
    """Fill a folder; what is there of it already stays. All processes call it, each makes every n-th shard.

    Args:
        folder: made where it is not there; all processes see the same.
        count: of the rows, at least 1.
        make: make(start, stop) -> the rows start … stop − 1 of every tensor.
        device: of this process.
        shard_rows: rows a file.
        done: told how many rows this process has made, or found, after each of its shards.

    Raises:
        SignFastError: `make` fails, a file cannot be written, or the processes do not see one folder.
    """
    rank, world = place()
    shards = -(-count // shard_rows)
    with raised_together(device):
        make_folder(folder)
        for number in range(rank, shards, world):
            start, stop = number * shard_rows, min(count, (number + 1) * shard_rows)
            path = folder / _name(number)
            if not _whole(path, stop - start):
                tensors = {name: t.detach().cpu().contiguous() for name, t in make(start, stop).items()}
                _write(path, tensors)
            done(stop - start)
    with raised_together(device):
        if rank == 0:
            lacking = [i for i in range(shards) if not (folder / _name(i)).is_file()]
            if lacking:
                raise SignFastError(
                    f"{folder / _name(lacking[0])}, which another process wrote, is not there: --outdir and --cache "
                    "must be folders that all machines see"
                )
            with safe_open(folder / _name(0), framework="pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()[1:]) for name in file.keys()}  # noqa: SIM118
            index = {"format": _FORMAT, "count": count, "shard_rows": shard_rows, "shapes": shapes}
            write_text(folder / _INDEX, json.dumps(index, indent=1) + "\n")


def _write(path: Path, tensors: Made) -> None:
    def save(temporary: Path) -> None:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise SignFastError(f"cannot write {path}: {first_line(error)}: free some space") from error

    write_atomically(path, save)


def _whole(path: Path, rows: int) -> bool:
    """Whether a shard is there; a damaged one is named in a warning and made again."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = {file.get_slice(name).get_shape()[0] for name in names}
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} is damaged ({first_line(error)}): making it again", stacklevel=2)
        return False
    return found == {rows}

"""A published snapshot: which networks it holds, the class and arguments that build one, and its weights."""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SignFastError, first_line
from ...models.precond import EDMPrecond, Precond, VEPrecond, VPPrecond, iDDPMPrecond
from ...models.pretrained import constructor_parameters
from ...models.unets import DhariwalUNet, SongUNet
from . import archives
from .machine import Budget, Machine
from .records import STORAGE_TABLE, Record, RefusedError, Storage, TensorRecord, say, snapshot_table

SUFFIXES = (".pkl", ".pickle")
DEFAULT_KEY = "ema"
MAX_FILE_BYTES = 16 * 2**30  # the largest published network has 1.2 GB
_MAX_PARTS, _MAX_DEPTH, _MAX_VALUES = 100_000, 32, 2000  # parts and depth of a network, values of its arguments
_CLASSES: dict[str, type[Precond]] = {c.__name__: c for c in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}
_UNETS: dict[str, type] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
_OWN = ("use_fp16", "sigma_min", "sigma_max", "sigma_data")  # attributes that programs set after construction
_TEACHER_LOSSES = {"EDMLoss", "VPLoss", "VELoss", "iDDPMLoss"}


@dataclass(eq=False)
class PublishedNetwork:
    """A network of a snapshot.

    Attributes:
        key: its entry, e.g. "ema".
        cls, kwargs: what builds it, e.g. "EDMPrecond" and its arguments.
        role: "teacher" or "student" where the snapshot's losses or the file's name say it, else None.
        tensors: its state_dict as records; `state` copies it out of the file.
    """

    path: Path
    key: str
    cls: str
    kwargs: dict[str, Any]
    role: str | None
    tensors: dict[str, TensorRecord]

    def state(self, net: Precond) -> dict[str, Tensor]:
        """The weights, float32.

        Args:
            net: such a network, on any device, to which they have to fit.

        Raises:
            SignFastError: they do not, or are not exact in float32.
        """
        from ..store import check_state

        expected = net.state_dict()
        # names and shapes first, so that no more is allocated than the network has
        shapes = {name: torch.empty(record.shape, device="meta") for name, record in self.tensors.items()}
        check_state(shapes, expected, self.path)
        with _explained(self.path):
            return {name: _float32(name, self.tensors[name]) for name in expected}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        raise SignFastError(f"{path} {error}") from error
    except MemoryError as error:
        raise SignFastError(f"{path} does not fit into memory: free some") from error


def _float32(name: str, record: TensorRecord) -> Tensor:
    value = record.tensor()
    exact = value.float()
    if not ((exact.to(value.dtype) == value) | value.isnan()).all():
        raise RefusedError(f"has {name} in {value.dtype}, which float32 cannot hold exactly")
    return exact


def read_snapshot(path: str | os.PathLike[str], key: str | None = None) -> PublishedNetwork:
    """Read a published .pkl; nothing that it carries is run, and nothing imported by a name in it.

    Args:
        path: a pickle of {'ema': network, …}, or of one network.
        key: the entry wanted; None means "ema".

    Raises:
        SignFastError: no such file, damaged, too large, it names what no published network needs, there is no network
            under that key, or it is one that the library does not have; one line.
    """
    path = Path(path)
    with _explained(path):
        root = _read(path)
        if isinstance(root, Record):
            root = {DEFAULT_KEY: root}
        if not isinstance(root, dict):
            raise RefusedError(f"holds {say(root)}, not the table of networks of a published snapshot")
        networks = {name: value for name, value in root.items() if isinstance(value, Record) and _is_network(value)}
        wanted = DEFAULT_KEY if key is None else key
        if wanted not in networks:
            held = ", ".join(say(name) for name in list(networks)[:8]) or "no network"
            other = [v for k, v in root.items() if k == wanted and isinstance(v, Record)]
            what = f"is {other[0].class_name[:60]!r}, no network of this library" if other else "is no network"
            raise RefusedError(
                f"holds {held}; {say(wanted)} {what}: name another by --key"
                if networks
                else f"holds no network of this library ({', '.join(_CLASSES)}); {say(wanted)} {what}"
            )
        record = networks[wanted]
        cls = record.class_name
        tensors = dict(_tensors(record))
        kwargs = _arguments(record)
        return PublishedNetwork(path, wanted, cls, kwargs, _role(path, root), tensors)


class _Nodes:
    """How many values a traversal may meet."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RefusedError("has modules or arguments nested without end")


def _is_network(record: Record) -> bool:
    return record.persistent and record.class_name in _CLASSES


def _read(path: Path) -> Any:
    """The value of the file, of records."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise RefusedError(f"is larger than {MAX_FILE_BYTES // 2**30} GiB: it is no published network")
            if size == 0:
                raise RefusedError("is empty: fetch it again")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise RefusedError(f"cannot be read ({first_line(error)})") from error
    budget = Budget(size)

    def load_storage(blob: Any) -> Storage:
        if not isinstance(blob, (memoryview, bytes)):
            raise RefusedError("has a storage that is not in bytes")
        budget.spend_bytes(len(blob))
        storage = archives.read(memoryview(blob), STORAGE_TABLE, budget)
        if not isinstance(storage, Storage):
            raise RefusedError(f"has {say(storage)} where a storage belongs")
        return storage

    def encode(text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise RefusedError("has bytes that are not written as protocol 2 writes them")
        budget.spend_bytes(len(text))
        try:
            return text.encode("latin1")
        except UnicodeEncodeError as error:
            raise RefusedError("has bytes that are not written as protocol 2 writes them") from error

    table = snapshot_table(load_storage, encode)
    if bytes(data[:4]) == archives.ZIP_MAGIC or bytes(data[2:14]) == archives.LEGACY_MAGIC:
        return archives.read(data, table, budget)  # written by torch.save instead of pickle.dump
    if data[0] != 0x80:  # PROTO
        raise RefusedError("is no pickle of protocol 2 or later: it is damaged, or no published snapshot")
    machine = Machine(data, table, budget)
    value = machine.run()
    if machine.at != size:
        raise RefusedError("is damaged: more follows its pickle")
    return value


_PART = re.compile(r"[A-Za-z0-9_]{1,100}", re.ASCII)


def _tensors(root: Record) -> Iterator[tuple[str, TensorRecord]]:
    """state_dict of a module's record: parameters and persistent buffers by their dotted names."""
    pending: list[tuple[str, Record, int]] = [("", root, 0)]
    nodes = _Nodes(_MAX_PARTS)  # a module may lie in itself, or be named a thousand times by each of a thousand
    while pending:
        prefix, record, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise RefusedError("has modules nested without end")
        unsaved = record.state.get("_non_persistent_buffers_set", set())
        for kind in ("_parameters", "_buffers"):
            for name, value in _members(record, kind, nodes):
                if value is None or (kind == "_buffers" and isinstance(unsaved, (set, frozenset)) and name in unsaved):
                    continue
                if not isinstance(value, TensorRecord):
                    raise RefusedError(f"has {prefix}{name}, which is {say(value)}, no tensor")
                yield f"{prefix}{name}", value
        for name, value in _members(record, "_modules", nodes):
            if value is None:
                continue
            if not isinstance(value, Record):
                raise RefusedError(f"has {prefix}{name}, which is {say(value)}, no module")
            pending.append((f"{prefix}{name}.", value, depth + 1))


def _members(record: Record, kind: str, nodes: _Nodes) -> Iterator[tuple[str, Any]]:
    members = record.state.get(kind, {})
    if not isinstance(members, dict):
        raise RefusedError(f"has a module whose {kind} are {say(members)}, no table")
    nodes.spend()
    for name, value in members.items():
        nodes.spend()
        if not isinstance(name, str) or not _PART.fullmatch(name):
            raise RefusedError(f"has a module with a part named {say(name)}")
        yield name, value


def _arguments(record: Record) -> dict[str, Any]:
    """The constructor's arguments as the network keeps them, by name, with what was changed on it afterwards."""
    cls, state = _CLASSES[record.class_name], record.state
    args, given = state.get("_init_args", ()), state.get("_init_kwargs")
    if not isinstance(args, (tuple, list)) or not isinstance(given, dict):
        raise RefusedError(
            f"holds a {record.class_name} without its constructor's arguments (_init_args, _init_kwargs): it is of "
            "another format than EDM's and SiD's snapshots"
        )
    own = constructor_parameters(cls)
    names = [name for name, p in own.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names) or any(name in given for name in names[: len(args)]):
        raise RefusedError(f"gives {record.class_name} more arguments than it takes")
    merged = {**dict(zip(names, args, strict=False)), **given}
    unet = merged.get("model_type", own["model_type"].default)
    if unet not in _UNETS:
        raise RefusedError(f"has a {record.class_name} around {say(unet)}: only {', '.join(_UNETS)} are known")
    known = {*names, *constructor_parameters(_UNETS[unet])} - {"in_channels", "out_channels"}
    for name in merged:
        if name not in known:
            raise RefusedError(
                f"gives {record.class_name} with {unet} the argument {say(name)}, which it does not take"
            )
    nodes = _Nodes(_MAX_VALUES)
    kwargs = {name: _plain(value, name, nodes) for name, value in merged.items()}
    for name in _OWN:
        if name in own and name in state:
            value = _plain(state[name], name, nodes)
            if value != kwargs.get(name, own[name].default):
                kwargs[name] = value
    for name in ("img_resolution", "img_channels", "label_dim"):
        if name in state and _plain(state[name], name, nodes) != kwargs.get(name, own[name].default):
            raise RefusedError(f"has a network whose {name} is not the one that it was made with")
    return kwargs


def _plain(value: Any, name: str, nodes: _Nodes, depth: int = 0) -> Any:
    """A value that JSON has; tuples become lists."""
    nodes.spend()
    if depth > 4:
        raise RefusedError(f"has arguments of a network without end, in {name}")
    if value is None or type(value) is bool:
        return value
    if type(value) is int and abs(value) < 2**53:
        return value
    if type(value) is float and not math.isnan(value):
        return value
    if type(value) is str and len(value) <= 100:
        return value
    if type(value) in (list, tuple):
        return [_plain(item, name, nodes, depth + 1) for item in value]
    raise RefusedError(f"has {say(value)} as argument {name} of a network")


def _role(path: Path, root: dict[Any, Any]) -> str | None:
    """From the loss that the snapshot was trained with, else from the file's name, as published ones are called."""
    loss = root.get("loss_fn")
    if isinstance(loss, Record) and loss.persistent:
        if loss.class_name in _TEACHER_LOSSES:
            return "teacher"
        if "sid" in loss.class_name.lower():
            return "student"
    name = path.name.lower()
    if re.match(r"(edm|baseline)-", name):
        return "teacher"
    # SiD's network-snapshot-ALPHA-KIMG.pkl, and its published names
    if re.match(r"(network-)?snapshot-\d\.\d+-\d+", name) or re.search(r"(^|[^a-z])sida?([^a-z]|$)", name):
        return "student"
    return None

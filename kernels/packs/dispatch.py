"""Launches from packs: which machine code a launch on a GPU takes, and what happens where there is none.

A hit is launched by `sign_fast._launcher`, without Triton. A miss is compiled just in time by Triton, with a warning
that names what is missing and how to build it; SIGN_FAST_NO_JIT=1 raises instead, and where there is no Triton the
operator takes plain PyTorch. Where there are no packs at all, Triton compiles everything and nothing is said.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ..device import Device, figures
from ..dispatch import MissingKernelError, NoKernelError, SlowPathWarning
from ..launch import Launch
from .architectures import KNOWN, Architecture
from .store import FOLDER, DamagedPackError, Pack, Variant, packs_in

NO_JIT = "SIGN_FAST_NO_JIT"
PACKS = "SIGN_FAST_PACKS"
NONE = "none"
"""The value of SIGN_FAST_PACKS that leaves all packs out, the package's own as well."""
CHECKED_BATCHES = (1, 64)
"""At which `DevicePacks.lacking` looks for missing variants."""
_OUT_OF_MEMORY = 2
_BROKEN = range(700, 800)  # CUresults after which CUDA does nothing more in this process


class MissingKernelWarning(SlowPathWarning):
    """A kernel is compiled just in time although there are packs: the first call of its kind takes seconds."""


@cache
def launcher_module() -> Any:
    """`sign_fast._launcher`, or the reason why it is missing, a text."""
    try:
        return importlib.import_module("sign_fast._launcher")
    except ImportError as error:
        return f"the launcher is not built ({error}): reinstall with a C++ compiler at hand"


@cache
def _launcher() -> Any:
    module = launcher_module()
    return None if isinstance(module, str) else module.Launcher()


def installed() -> list[Pack]:
    """The packs that came with the package, then those of the folders that SIGN_FAST_PACKS names; with "none" no packs.

    A folder that is named and has no packs is warned about.
    """
    names = [name for name in os.environ.get(PACKS, "").split(os.pathsep) if name]
    if names == [NONE]:
        return []
    found = packs_in(FOLDER)
    for name in names:
        own = packs_in(Path(name))
        if not own:
            warnings.warn(
                f"{PACKS} names {Path(name).absolute()}, where there are no packs (sm_*.zip)",
                SlowPathWarning,
                stacklevel=2,
            )
        found += own
    return found


def title(pack: Pack) -> str:
    """A pack's name: its file's among the package's own, its path elsewhere."""
    return pack.path.name if pack.path.parent == FOLDER else str(pack.path)


def usable(number: int, packs: list[Pack] | None = None) -> list[Pack]:
    """The packs that a GPU of an architecture such as 90 can use, the best first: its own machine code, that of the
    nearest older architecture, then PTX, the newest first.

    Damaged packs are left out with a warning.
    """
    found: list[tuple[bool, int, Pack]] = []
    for pack in installed() if packs is None else packs:
        try:
            own, is_ptx = Architecture(pack.architecture), pack.kind == "ptx"
        except DamagedPackError as error:
            warnings.warn(f"a pack of machine code is left out: {error}", SlowPathWarning, stacklevel=2)
            continue
        if own.number <= number if is_ptx else own.runs_on(number):
            found.append((not is_ptx, own.number, pack))
    return [pack for _, _, pack in sorted(found, key=lambda entry: entry[:2], reverse=True)]


@dataclass(frozen=True)
class Miss:
    """A launch that no pack served: the variant's key and why."""

    key: str
    why: str


class DevicePacks:
    """The packs of one GPU, and what they have served.

    Args:
        index: the GPU's number.
        number: its architecture, 90 for compute capability 9.0.
        packs: as `usable` orders them.
        launcher: a `sign_fast._launcher.Launcher`.

    Attributes:
        hits: launches served, by kernel.
        misses: how often each miss came up.
    """

    def __init__(self, index: int, number: int, packs: list[Pack], launcher: Any) -> None:
        self.index, self.number, self.packs = index, number, packs
        self.hits: Counter[str] = Counter()
        self.misses: Counter[Miss] = Counter()
        self._launcher = launcher
        self._missed: dict[str, Miss] = {}
        self._declared: set[str] = set()
        self._warned = False
        self._lock = threading.Lock()

    def launch(self, launch: Launch, stream: int) -> bool:
        """Launch from a pack on a stream; False: Triton has to.

        Raises:
            MissingKernelError: no pack has it, and SIGN_FAST_NO_JIT=1.
            NoKernelError: no pack has it, and there is no Triton.
            torch.OutOfMemoryError: no memory for the module.
            sign_fast._launcher.DriverError: the launch itself failed, or CUDA was in use before a fork.
        """
        name = launch.name
        if name not in self._declared and not self._declare(name):
            return self._miss(self._missed.get(name) or self._missed.setdefault(name, Miss(name, self._lacking(name))))
        given = (
            self.index, stream, name, launch.grid, launch.arguments, launch.constants,
            launch.num_warps, launch.num_stages, launch.enable_fp_fusion,
        )  # fmt: skip
        key = self._try(given)
        if key is not None:
            missed = self._missed.get(key) or self._load(name, key)
            if missed is not None:
                return self._miss(missed)
            key = self._try(given)
            assert key is None, key
        self.hits[name] += 1
        return True

    def lacking(self, device: Device) -> list[str]:
        """The variants that the packs' networks launch on this GPU at `CHECKED_BATCHES` and no pack has.

        Args:
            device: this GPU's figures.
        """
        from . import calls  # which describes all operators

        names = {name for pack in self.packs for name in pack.networks}
        wanted = dict.fromkeys(call for name, own in calls.networks().items() if name in names for call in own)
        missing: dict[str, None] = {}
        for call in wanted:
            for launch in (launch for batch in CHECKED_BATCHES for launch in call.launches(batch, device)):
                name = launch.name
                if name not in self._declared and not self._declare(name):
                    missing.setdefault(name)
                    continue
                options = (launch.num_warps, launch.num_stages, launch.enable_fp_fusion)
                key = self._launcher.key(name, launch.arguments, launch.constants, *options)
                if not any(name in pack.current and pack.find(key) is not None for pack in self.packs):
                    missing.setdefault(key)
        return list(missing)

    def _try(self, given: tuple[Any, ...]) -> str | None:
        try:
            return self._launcher.launch(*given)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if getattr(error, "code", None) == _OUT_OF_MEMORY:
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def _declare(self, name: str) -> bool:
        if name in self._missed:
            return False
        for pack in self.packs:
            try:
                kernel = pack.current.get(name)
            except DamagedPackError:  # which _lacking, or _load, will tell of
                continue
            if kernel is not None:
                none = inspect.Parameter.empty
                rows = [(n, constant, none, *rest) for n, constant, *rest in kernel.parameters]
                self._launcher.declare(name, rows)
                self._declared.add(name)
                return True
        return False

    def _lacking(self, name: str) -> str:
        """Why no pack's entry of a kernel is of use."""
        for pack in self.packs:
            try:
                if name in pack.kernels:
                    return f"{title(pack)} is of another version of the kernel's source"
            except DamagedPackError as error:
                return str(error)
        return "no pack has that kernel"

    def _load(self, name: str, key: str) -> Miss | None:
        """Hand the variant to the launcher, from the best pack that has it."""
        with self._lock:
            why = "no pack has that variant"
            for pack in self.packs:
                try:
                    if name not in pack.current or (variant := pack.find(key)) is None:
                        continue
                    self._add(key, variant, pack.image(variant))
                    return None
                except DamagedPackError as error:
                    why = str(error)
                except ValueError as error:  # of the launcher, which an entry that makes no sense leads to
                    why = f"{title(pack)} has a wrong entry: {error}"
                except RuntimeError as error:
                    code = getattr(error, "code", None)
                    if code == _OUT_OF_MEMORY:
                        raise torch.OutOfMemoryError(str(error)) from error
                    if code is None or code in _BROKEN or getattr(error, "function", "") == "fork":
                        raise
                    why = f"{title(pack)}: {error}"  # another pack's may do, or what Triton makes for this driver
            return self._missed.setdefault(key, Miss(key, why))

    def _add(self, key: str, variant: Variant, image: bytes) -> None:
        sizes = bytes(variant.parameter_sizes)
        self._launcher.add(self.index, key, image, variant.symbol, variant.num_warps, variant.shared_bytes, sizes)

    def _miss(self, missed: Miss) -> bool:
        self.misses[missed] += 1
        refuse_jit(partial(self._told, missed))  # told where it is asked for: a variant may miss at every launch
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._told(missed)}; Triton compiles it, and what else is missing, at the first call",
                MissingKernelWarning,
                stacklevel=2,
            )
        return False

    def _told(self, missed: Miss) -> str:
        return f"no machine code for {missed.key} on cuda:{self.index}: {missed.why}; {build_line(self.number)}"


def build_line(number: int) -> str:
    """How packs for a GPU's architecture are made."""
    archs = Architecture(number).capability if number in KNOWN else "8.9+PTX"  # which is for GPUs to come, too
    return (
        f"for your network's shapes: sign-fast build-cubins --archs {archs} --network NETWORK --outdir packs, and "
        f"{PACKS}=$PWD/packs; for the published networks': SIGN_FAST_ARCHS={archs} python -m build --wheel "
        "--no-isolation"
    )


def refuse_jit(missing: Callable[[], str]) -> None:
    """Return where Triton may compile what is missing.

    Args:
        missing: says what.

    Raises:
        MissingKernelError: SIGN_FAST_NO_JIT=1.
        NoKernelError: Triton is not installed.
    """
    if os.environ.get(NO_JIT) == "1":
        raise MissingKernelError(f"{missing()}; {NO_JIT}=1 forbids compiling it now")
    if not _has_triton():
        raise NoKernelError(f"{missing()}; Triton, which could compile it now, is not installed")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_on_device: dict[int, DevicePacks | None] = {}


def of_device(index: int) -> DevicePacks | None:
    """The packs of a GPU of this process; None where there are none, or no launcher."""
    try:
        return _on_device[index]
    except KeyError:
        return _on_device.setdefault(index, _packs_of(index))


def _packs_of(index: int) -> DevicePacks | None:
    if not (packs := installed()):
        return None
    number = figures(index).architecture
    launcher = _launcher()
    if launcher is None:
        warnings.warn(f"packs of machine code are not used: {launcher_module()}", SlowPathWarning, stacklevel=4)
        return None
    fitting = usable(number, packs)
    if not fitting:
        names = ", ".join(map(title, packs))
        warnings.warn(
            f"no pack of machine code fits cuda:{index} (sm_{number}), there are {names}; {build_line(number)}",
            MissingKernelWarning,
            stacklevel=4,
        )
    return DevicePacks(index, number, fitting, launcher)


def serves(index: int) -> bool:
    """Whether a GPU has packs to launch from, so that Triton may be missing."""
    packs = of_device(index)
    return packs is not None and bool(packs.packs)


def _without_packs(launch: Launch, index: int) -> str:
    line = build_line(figures(index).architecture)
    return f"no machine code for {launch.name} on cuda:{index}: there are no packs; {line}"


def run(launches: Iterable[Launch], index: int) -> None:
    """Run launches in order on a GPU's current stream, from packs where they have them, else by Triton.

    Raises:
        MissingKernelError: no pack has one, and SIGN_FAST_NO_JIT=1.
        NoKernelError: no pack has one, and there is no Triton.
        torch.OutOfMemoryError: the GPU has no memory for a launch.
    """
    packs = of_device(index)
    stream = torch._C._cuda_getCurrentRawStream(index) if packs is not None else 0
    for launch in launches:
        if packs is None:
            refuse_jit(partial(_without_packs, launch, index))
        elif packs.launch(launch, stream):
            continue
        with torch.cuda.device(index):  # Triton launches on the current device, not on its arguments' one
            launch.run()

"""Compiles packs: every kernel variant that networks need on an architecture's GPUs, in parallel.

Needs Triton and no GPU. The same calls, sources and Triton give the same bytes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from ..ahead_of_time import compile, specialise
from ..device import Device, interpreting
from ..launch import Launch
from . import calls as known
from . import elf
from .architectures import SPECIFIC, Architecture
from .calls import BATCHES, Call
from .devices import devices_for
from .key import kernel_name, key, parameters
from .store import Kernel, Variant, seal, source_hash, write_pack

NEWEST_FORWARD = 89
"""The newest architecture whose PTX other GPUs run: Triton's is specific to one from 9.0 on."""
_CHUNK = 8  # variants a worker compiles at a time
_PART = 64  # calls whose launches a worker writes down at a time


class BuildError(RuntimeError):
    """A pack cannot be built; the message is one line and says what to do."""


@dataclass(frozen=True)
class Need:
    """A variant that has to be compiled: the place-th launch of a call at a batch on a device."""

    key: str
    call: Call
    batch: int
    device: Device
    place: int

    def launch(self) -> Launch:
        """The launch that needs it, with tensors on the meta device."""
        return self.call.launches(self.batch, self.device)[self.place]


def chosen(networks: Sequence[str] | None, table: Mapping[str, Sequence[Call]]) -> dict[str, Sequence[Call]]:
    """The networks of the table with these names, or whose names begin with them and a hyphen; all if None.

    Raises:
        BuildError: a name fits none, or there is none.
    """
    if networks is None:
        return dict(table)
    if not networks:
        raise BuildError("no network is named: leave presets out for all, or name e.g. digits")
    found: dict[str, Sequence[Call]] = {}
    for name in networks:
        fitting = {n: c for n, c in table.items() if n == name or n.startswith(f"{name}-")}
        if not fitting:
            raise BuildError(
                f"unknown network {name!r}: known are {', '.join(table)}, or their first parts as in digits"
            )
        found |= fitting
    return {name: found[name] for name in table if name in found}


def needs(calls: Iterable[Call], gpus: Iterable[Device]) -> list[Need]:
    """Every different variant that the calls lead to at the batches of `BATCHES`, in the order of its key."""
    found: dict[str, Need] = {}
    for device in gpus:
        for call in dict.fromkeys(calls):
            for batch in BATCHES:
                for place, launch in enumerate(call.launches(batch, device)):
                    name = key(launch)
                    if name not in found:
                        found[name] = Need(name, call, batch, device, place)
    return sorted(found.values(), key=lambda need: need.key)


def compile_variant(need: Need, architecture: int, ptx: bool) -> tuple[Variant, bytes]:
    """The variant and its machine code, or PTX.

    Raises:
        BuildError: the code asks for something that the launcher does not do.
    """
    launch = need.launch()
    done = compile(launch, architecture)
    facts = done.metadata
    scratch = facts.get("global_scratch_size", 0) or facts.get("profile_scratch_size", 0)
    special = [name for name in ("launch_cooperative_grid", "launch_pdl") if facts.get(name)]
    if scratch or special or facts.get("num_ctas", 1) != 1:
        raise BuildError(f"{need.key}: the launcher gives no scratch memory, clusters or {special}")
    # the driver takes PTX as text that ends with a zero
    image = done.ptx.encode() + b"\0" if ptx else done.cubin
    variant = Variant(
        key=need.key,
        member="",
        symbol=done.name,
        num_warps=done.num_warps,
        shared_bytes=done.shared_bytes,
        parameter_sizes=tuple(elf.parameter_sizes(done.cubin, done.name)),
        registers=elf.registers(done.cubin, done.name),
        signature={name: kind for name, kind in specialise(launch).signature.items() if kind != "constexpr"},
    )
    return replace(variant, member=f"{seal(variant, image)}.{'ptx' if ptx else 'cubin'}"), image


def _compile(job: tuple[Need, int, bool]) -> tuple[Variant, bytes]:
    try:
        return compile_variant(*job)
    except BuildError:
        raise
    except Exception as error:  # Triton's own do not survive the way to another process
        lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
        line = next((text for text in lines if text.startswith("ptxas") and "fatal" in text), lines[0])
        raise BuildError(f"{job[0].key} does not compile for {job[1]}: {line}") from None


def _start(folder: str) -> None:
    # neither what was compiled before nor what somebody tries out gets into a pack
    for name in ("TRITON_DEBUG", "TRITON_KERNEL_OVERRIDE", "TRITON_KERNEL_DUMP", "DISABLE_PTXAS_OPT", "PTXAS_OPTIONS"):
        os.environ.pop(name, None)
    os.environ["TRITON_CACHE_DIR"] = folder
    tempfile.tempdir = folder  # where the assembler's files go
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a parent that was killed


def _ptxas(architecture: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(architecture).version)


def build(
    architectures: Sequence[Architecture],
    outdir: Path,
    *,
    networks: Sequence[str] | None = None,
    table: Mapping[str, Sequence[Call]] | None = None,
    jobs: int | None = None,
    report: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Path]:
    """Compile the packs of some architectures: sm_90.zip and, with +PTX, ptx_89.zip or an older one's.

    Args:
        architectures: e.g. `architectures.parse("8.0;9.0")`.
        outdir: made where it is missing; each pack appears there when it is complete.
        networks: names of the table, or their first parts; None takes all.
        table: calls by network; None takes those that wheels are built for.
        jobs: processes; None takes as many as there are cores.
        report: told the pack's name, how many variants are done and of how many.

    Returns:
        The packs' paths.

    Raises:
        BuildError: Triton is missing, a network is unknown, or a variant does not compile.
        OSError: a pack cannot be written.
    """
    try:
        import triton
    except ImportError as error:
        raise BuildError("packs are compiled by Triton, which is not installed: pip install triton") from error
    if interpreting():
        raise BuildError("TRITON_INTERPRET is set, under which nothing is compiled: unset it")
    selected = chosen(networks, known.networks() if table is None else table)
    calls = [call for own in selected.values() for call in own]
    targets = [(a.number, False) for a in architectures]
    forward = {min(a.number, NEWEST_FORWARD) if a.number >= SPECIFIC else a.number for a in architectures if a.ptx}
    targets += [(number, True) for number in sorted(forward)]
    outdir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=outdir).close()  # before minutes of compiling
    paths = []
    with tempfile.TemporaryDirectory() as cache, _workers(jobs or os.cpu_count() or 1, cache) as pool:
        for number, ptx in targets:
            name = f"ptx_{number}" if ptx else f"sm_{number}"
            wanted = _needs(pool, calls, devices_for(number, ptx))
            if not wanted:
                raise BuildError("the networks make no calls that are compiled")
            kernels: dict[str, Kernel] = {}
            for need in wanted:
                if (kernel := need.key.split(" ", 1)[0]) not in kernels:
                    kernels[kernel] = _described(need.launch())
            done = []
            try:
                for entry in pool.map(_compile, [(need, number, ptx) for need in wanted], chunksize=_CHUNK):
                    done.append(entry)
                    report(name, len(done), len(wanted))
            except BrokenProcessPool as error:
                raise BuildError(
                    "a compiling process ended: if it was killed for memory, set MAX_JOBS lower; a program that calls "
                    "build() needs `if __name__ == '__main__':`"
                ) from error
            path = outdir / f"{name}.zip"
            kind: Literal["cubin", "ptx"] = "ptx" if ptx else "cubin"
            write_pack(path, number, kind, triton.__version__, _ptxas(number), selected, kernels, done)
            paths.append(path)
    return paths


@contextmanager
def _workers(count: int, cache: str) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile; where something goes wrong what is still to be done is not waited for."""
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=(cache,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _needs(pool: ProcessPoolExecutor, calls: Sequence[Call], gpus: tuple[Device, ...]) -> list[Need]:
    """`needs`, in parallel."""
    distinct = list(dict.fromkeys(calls))
    parts = [distinct[start : start + _PART] for start in range(0, len(distinct), _PART)]
    found: dict[str, Need] = {}
    for part in pool.map(needs, parts, [gpus] * len(parts)):
        for need in part:
            found.setdefault(need.key, need)
    return sorted(found.values(), key=lambda need: need.key)


def _described(launch: Launch) -> Kernel:
    rows = []
    for name, constant, default, by_value, alignment in parameters(launch.function):
        if default is not Parameter.empty:
            raise BuildError(f"{kernel_name(launch)}: the parameter {name} has a default: give it at every launch")
        rows.append((name, constant, by_value, alignment))
    return Kernel(source_hash(kernel_name(launch)), tuple(rows))

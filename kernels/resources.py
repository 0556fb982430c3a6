"""What compiled machine code needs of a GPU: registers, spills, shared memory, occupancy, how wide it reads and writes.

Two sources. The machine code itself, through the `cuobjdump` in Triton's own package: registers, the stack and local
memory that spilled registers go to, instructions by name. And the PTX assembly it was made from: there each access to
global memory can be followed back to the argument whose pointer it uses, which the machine code no longer shows; ptxas
keeps the widths of global accesses.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .ahead_of_time import Compiled
from .device import KNOWN
from .launch import Launch


@dataclass(frozen=True)
class Resources:
    """
    Args:
        registers: a thread's.
        spilled_bytes: stack and local memory a thread, or, where that is none, 4 a spilling instruction; 0 is good.
        shared_bytes: a program's shared memory, fixed and requested at launch.
        warps: a program's.
        occupancy: resident warps over the most that a multiprocessor holds, by registers, shared memory and warps.
        loads, stores: global accesses in the machine code by bytes a thread; asynchronous copies are loads, whole
            tiles moved by the tensor memory accelerator stand under `TILE`.
        atomics: global atomic instructions.
        matrix: matrix instructions by name: HMMA, HGMMA (Hopper's wgmma), UTCHMMA (Blackwell's tcgen05), ...
        accesses: by argument, how many PTX instructions access it with how many bytes a thread.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    loads: Mapping[int, int] = field(default_factory=dict)
    stores: Mapping[int, int] = field(default_factory=dict)
    atomics: int = 0
    matrix: Mapping[str, int] = field(default_factory=dict)
    accesses: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


TILE = 128
"""The width that an access by the tensor memory accelerator is listed under: it moves whole lines of a tile."""

# Of one multiprocessor: resident warps, resident programs. CUDA C programming guide, technical specifications
_RESIDENT = {80: (64, 32), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}
_REGISTERS = 65536
_RESERVED_SHARED = 1024  # a program's, the driver's own


def occupancy(architecture: int, registers: int, shared_bytes: int, warps: int) -> float:
    """Resident warps over the most possible, as the vendor's occupancy calculator computes them."""
    most_warps, most_programs = _RESIDENT[architecture]
    a_warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256 a warp, to four partitions
    by_registers = _REGISTERS // 4 // max(a_warp, 256) * 4 // warps
    shared = -(-(shared_bytes + _RESERVED_SHARED) // 128) * 128
    by_shared = (KNOWN[architecture].shared_bytes + _RESERVED_SHARED) // shared
    return min(most_programs, most_warps // warps, by_registers, by_shared) * warps / most_warps


def _cuobjdump() -> str:
    import triton

    try:
        return str(triton.knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        where = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        raise FileNotFoundError(
            f"cuobjdump is not in Triton's package ({where}): reinstall Triton from its own wheel, "
            "or name CUDA's cuobjdump in TRITON_CUOBJDUMP_PATH"
        ) from None


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_]+)*)", re.M)
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _width(modifiers: str) -> int:
    return next((_WIDTH[m] for m in reversed(modifiers.split(".")) if m in _WIDTH), 4)


def resources(compiled: Compiled) -> Resources:
    """Read the machine code.

    Raises:
        FileNotFoundError: there is no cuobjdump.
    """
    text = _disassemble(compiled.cubin)
    usage = re.search(rf"Function {re.escape(compiled.name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if usage is None:
        raise ValueError(f"cuobjdump says nothing about {compiled.name}")
    registers, stack, fixed, local = map(int, usage.groups())
    if compiled.architecture >= 90:
        fixed = max(0, fixed - _RESERVED_SHARED)  # counted with the program's own there
    shared = fixed + compiled.shared_bytes
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    matrix: Counter[str] = Counter()
    spills = atomics = 0
    for name, modifiers in _SASS.findall(text):
        if name in ("LDG", "LDGSTS", "LD"):
            loads[_width(modifiers)] += 1
        elif name in ("STG", "ST"):
            stores[_width(modifiers)] += 1
        elif name in ("UTMALDG", "UBLKCP", "UBLKCP_S"):
            loads[TILE] += 1
        elif name in ("UTMASTG", "UTMAREDG"):
            stores[TILE] += 1
        elif name in ("ATOMG", "ATOM", "RED", "REDG"):
            atomics += 1
        elif name in ("LDL", "STL"):
            spills += 1
        elif name.endswith("MMA"):
            matrix[name] += 1
    return Resources(
        registers,
        stack + local or 4 * spills,
        shared,
        compiled.num_warps,
        occupancy(compiled.architecture, registers, shared, compiled.num_warps),
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
        atomics,
        dict(sorted(matrix.items())),
        _accesses(compiled),
    )


_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", re.M)
_REGISTER = re.compile(r"%[a-z]+\d+")
_GLOBAL = re.compile(r"^(?:ld|st|red|atom|ldu)\.(?:\w+\.)*global|^cp\.async")
_DESTINATION = re.compile(r"^(\{[^}]*\}|[^,]*)")


def _instructions(ptx: str) -> Iterator[tuple[str, str]]:
    yield from _INSTRUCTION.findall(ptx)


def _bytes_of(opcode: str, operands: str) -> int:
    if opcode.startswith("cp.async.bulk"):
        return TILE
    if opcode.startswith("cp.async"):
        size = re.search(r"\],\s*(0x[0-9a-f]+|\d+)", operands)
        return int(size.group(1), 0) if size else 0
    kind = re.search(r"\.[busf](\d+)(?:x2)?(?:\.|$)", opcode)
    vector = re.search(r"\.v(\d)", opcode)
    return (int(kind.group(1)) // 8 if kind else 0) * (int(vector.group(1)) if vector else 1)


def _accesses(compiled: Compiled) -> dict[str, dict[int, int]]:
    """By argument: bytes a thread -> number of PTX instructions.

    Each register carries the set of pointer arguments that it was computed from, to a fixed point; what is loaded from
    memory carries none. An access through a choice between two pointers counts for both.
    """
    prefix = f"{compiled.name}_param_"
    names = {f"{prefix}{i}": name for i, name in enumerate(compiled.parameters)}
    pointers = set(re.findall(rf"\.param \.u64 \.ptr[^,)]*?({re.escape(prefix)}\d+)", compiled.ptx))
    origin: defaultdict[str, set[str]] = defaultdict(set)
    memory: list[tuple[str, str]] = []
    moves: list[tuple[list[str], list[str]]] = []
    for opcode, operands in _instructions(compiled.ptx):
        if opcode.startswith("ld.param"):
            source = re.search(r"\[(\w+)", operands)
            if source and source.group(1) in pointers and source.group(1) in names:
                for register in _REGISTER.findall(_DESTINATION.match(operands)[0]):  # type: ignore[index]
                    origin[register].add(names[source.group(1)])
        elif _GLOBAL.match(opcode):
            if "[" in operands:  # not a commit or a wait
                memory.append((opcode, operands))
        elif not opcode.startswith(("ld.", "st.", "setp", "mma", "wgmma", "ldmatrix", "stmatrix", "shfl", "bar")):
            target = _DESTINATION.match(operands)[0]  # type: ignore[index]
            if sources := _REGISTER.findall(operands[len(target) :]):
                moves.append((_REGISTER.findall(target), sources))
    changed = True
    while changed:
        changed = False
        for targets, sources in moves:
            found = set().union(*(origin[s] for s in sources if s in origin))
            for target_register in targets:
                if not found <= origin[target_register]:
                    origin[target_register] |= found
                    changed = True
    table: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for opcode, operands in memory:
        inside = " ".join(re.findall(r"\[[^\]]*\]", operands))
        address = set().union(*(origin[register] for register in _REGISTER.findall(inside)))
        for name in address:
            table[name][_bytes_of(opcode, operands)] += 1
    return {name: dict(sorted(table[name].items())) for name in compiled.parameters if name in table}


def wide_share(found: Resources, launch: Launch, names: Container[str] | None = None) -> float | None:
    """The share of the launch's bytes that 16-byte accesses (or wider ones) move, None where it moves none.

    An argument's bytes, its tensor's size, are taken to be spread evenly, by width, over the instructions that access
    it; a loop's instructions count as often as those before it. So a large activation weighs as much as it is large,
    and a few narrow accesses to statistics or parameters as little as they are. `names` are the arguments to look at,
    all if None.
    """
    wide = total = 0.0
    for name, widths in found.accesses.items():
        tensor = launch.arguments[name]
        if not isinstance(tensor, Tensor) or (names is not None and name not in names):
            continue
        size = tensor.numel() * tensor.element_size()
        moved = sum(width * count for width, count in widths.items())
        wide += size * sum(width * count for width, count in widths.items() if width >= 16) / max(moved, 1)
        total += size
    return wide / total if total else None

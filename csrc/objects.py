"""Compiles C++ files to objects, in parallel, and keeps those that are up to date.

Stands alone: setup.py loads this file by its path. Wheels, editable and in-place builds share one folder of objects, so
that nothing is compiled twice. An object is up to date if its command is the same and no file that it was made from is
newer than it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

Macro = tuple[str, str | None]


class Unit(NamedTuple):
    """One compilation.

    Args:
        source: the file, relative to the tree.
        folder: of the object, in the folder of all objects; tells compilations of one source apart.
        flags, macros, include_dirs: of the compiler, besides those that Python's own configuration asks for.
    """

    source: str
    folder: str
    flags: Sequence[str]
    macros: Sequence[Macro]
    include_dirs: Sequence[str]


CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
}
_FLAGS = ("-O3", "-std=c++20", "-fvisibility=hidden", "-g0")
# -fopenmp is not linked: the symbols come with torch's own libgomp, a second one would have a second thread pool;
# -w: torch's headers warn a lot
_TORCH_FLAGS = ("-fopenmp", "-fno-math-errno", "-w", "-Wno-psabi")


_MAP = "-ffile-prefix-map="


def _sources(tree: Path, folder: str) -> list[str]:
    return sorted(str(file.relative_to(tree)) for file in tree.glob(f"{folder}/*.cpp"))


def launcher_units(tree: Path, macros: Sequence[Macro]) -> list[Unit]:
    """The compilations of `sign_fast._launcher`."""
    flags = [*_FLAGS, f"{_MAP}{tree}=sign_fast"]
    return [Unit(file, "", flags, macros, []) for file in _sources(tree, "csrc/launcher")]


def torch_units(tree: Path, torch: str, include_dirs: Sequence[str]) -> list[Unit]:
    """The compilations of `sign_fast._C`: each csrc/*_kernel.cpp once a CPU capability, the other files once.

    Args:
        torch: its version; another one compiles anew.
        include_dirs: torch's; their places do not get into the objects.
    """
    flags = [*_FLAGS, *_TORCH_FLAGS, f"{_MAP}{tree}=sign_fast"]
    flags += [f"{_MAP}{folder}=torch" for folder in include_dirs]
    macros: list[Macro] = [("TORCH_API_INCLUDE_EXTENSION_H", None), ("TORCH_EXTENSION_NAME", "_C")]
    macros.append(("SIGN_FAST_TORCH", re.sub(r"\W", "_", torch)))
    found = []
    for file in _sources(tree, "csrc"):
        if not file.endswith("_kernel.cpp"):
            found.append(Unit(file, "", flags, macros, include_dirs))
            continue
        for name, options in CAPABILITIES.items():
            own: list[Macro] = [("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None)]
            own.append(("SIGN_FAST_CAPABILITY", name))
            found.append(Unit(file, name.lower(), flags + options, macros + own, include_dirs))
    return found


def _command(compiler: Any) -> list[str]:
    # older distutils, which something may have imported before setuptools, compile C++ with the compiler of C
    return list(getattr(compiler, "compiler_so_cxx", compiler.compiler_so))


def compiler_version(compiler: Any) -> str:
    """The first line of what setuptools' C++ compiler says of itself; empty where it says nothing.

    Raises:
        OSError: it cannot be started.
    """
    done = subprocess.run([_command(compiler)[0], "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[0]


def compile_objects(compiler: Any, units: Sequence[Unit], folder: Path, jobs: int) -> list[str]:
    """The paths of the objects, in the units' order; `compiler` is setuptools' one.

    Raises:
        RuntimeError: a file does not compile; what has not begun then is not compiled.
    """
    version = compiler_version(compiler)

    def compile_one(unit: Unit) -> str:
        built = (folder / unit.folder / unit.source).with_suffix(".o")
        flags = [flag for flag in unit.flags if not flag.startswith(_MAP)]  # whose purpose is that paths do not matter
        command = repr((version, _command(compiler), unit._replace(flags=flags)))
        command = hashlib.sha256(command.encode()).hexdigest()
        stamp = built.with_suffix(".command")
        if not (stamp.exists() and stamp.read_text() == command and _current(built)):
            stamp.unlink(missing_ok=True)  # a compilation that is cut off leaves no stamp
            try:
                compiler.compile(
                    [unit.source],
                    output_dir=str(folder / unit.folder),
                    macros=list(unit.macros),
                    include_dirs=list(unit.include_dirs),
                    extra_postargs=[*unit.flags, "-MMD"],
                )
            except Exception as error:  # whose text is the whole command line; the compiler's own messages stand above
                raise RuntimeError(f"{unit.source} does not compile") from error
            stamp.write_text(command)
        return str(built)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(compile_one, unit) for unit in units]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _current(built: Path) -> bool:
    """By the dependencies that the compiler wrote beside the object."""
    try:
        text = built.with_suffix(".d").read_text().replace("\\\n", " ")
        when = built.stat().st_mtime
        return all(Path(file).stat().st_mtime <= when for file in text.split(": ", 1)[1].split())
    except (OSError, IndexError):
        return False

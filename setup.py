"""Builds the optional C++ extension `sign_fast._C`; everything else is in pyproject.toml. Never uses the network.

The install succeeds without the extension, says why it is missing, and leaves the reason in
kernels/extension_build.json for `sign-fast info`. SIGN_FAST_SKIP_EXT=1 skips it, SIGN_FAST_FORCE_BUILD=1 makes a
failed build an error, MAX_JOBS bounds the compilers that run at a time.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NOTE = "kernels/extension_build.json"
# csrc/*_kernel.cpp are compiled once a CPU capability, the other files once
KERNELS = sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/*_kernel.cpp"))
SOURCES = sorted({str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/*.cpp")} - set(KERNELS))
HEADERS = sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/*.h"))
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
}
# -fopenmp is not linked: the symbols come with torch's own libgomp, a second one would have a second thread pool
FLAGS = [
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-g0",
    "-std=c++20",
    "-w",
    "-Wno-psabi",
]  # -w: torch's headers warn a lot

if not (3, 10) <= sys.version_info < (3, 14):
    sys.exit(f"sign_fast: Python 3.10 to 3.13 is needed, this is {platform.python_version()}: use another interpreter")
if not (sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")):
    sys.exit(
        f"sign_fast: x86-64 Linux is needed, this is {sys.platform} on {platform.machine()}: "
        "use such a machine, a container or WSL 2"
    )


def write_note(**facts: str) -> None:
    (ROOT / NOTE).write_text(json.dumps(facts) + "\n")


def skip(reason: str) -> None:
    if os.environ.get("SIGN_FAST_FORCE_BUILD") == "1":
        sys.exit(f"sign_fast: the C++ extension cannot be built ({reason}), and SIGN_FAST_FORCE_BUILD=1 asks for it")
    write_note(skipped=reason)
    print(
        f"sign_fast: installing without the C++ extension: {reason}. Everything works, slower on a CPU.",
        file=sys.stderr,
    )


def cannot_build() -> str | None:
    """Why there will be no extension, as far as that is known before compiling."""
    if os.environ.get("SIGN_FAST_SKIP_EXT") == "1":
        return "SIGN_FAST_SKIP_EXT=1 was set"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed where it is built (install torch, then use pip install --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler}) was found"
    return None


class OptionalBuild(build_ext):
    """Builds with torch's BuildExtension (ninja where it is there); a failure leaves the package without extension."""

    def run(self) -> None:
        reason = cannot_build()
        if reason is not None:
            skip(reason)
            self.extensions = []
            return
        import torch
        from torch.utils.cpp_extension import BuildExtension

        class Build(BuildExtension):
            def build_extensions(self) -> None:
                # torch's build gives all files the same flags; the kernels need theirs, so they come as objects
                self.extensions[0].extra_objects = compile_kernels(self.compiler, self.build_temp)
                super().build_extensions()

        command = Build(self.distribution, no_python_abi_suffix=False)
        command.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))
        command.inplace = self.inplace
        command.force = self.force
        command.editable_mode = getattr(self, "editable_mode", False)
        command.finalize_options()
        try:
            command.run()
        except (Exception, SystemExit) as error:
            # the message repeats the compiler's command line, whose errors stand above
            skip(f"compiling failed: {str(error).strip()[:80] or type(error).__name__} …")
            self.extensions = []
            return
        write_note(torch=torch.__version__)


def compile_kernels(compiler: Any, folder: str) -> list[str]:
    """One object of each kernel file a CPU capability, in parallel; up-to-date ones are kept."""
    import torch
    from torch.utils.cpp_extension import include_paths

    def compile_one(job: tuple[str, str]) -> str:
        source, name = job
        target = Path(folder, name.lower())
        built = target / source.replace(".cpp", ".o")
        newest = max(os.path.getmtime(ROOT / file) for file in [source, *HEADERS, "setup.py"])
        if not built.exists() or built.stat().st_mtime < max(newest, os.path.getmtime(torch.__file__)):
            macros = [("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None), ("SIGN_FAST_CAPABILITY", name)]
            compiler.compile(
                [source],
                output_dir=str(target),
                macros=macros,
                include_dirs=include_paths(),
                extra_postargs=FLAGS + CAPABILITIES[name],
            )
        return str(built)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, [(source, name) for source in KERNELS for name in CAPABILITIES]))


class BuildPy(build_py):
    """Puts the extension's note into the package; build_ext runs first so that it is current."""

    def run(self) -> None:
        if not self.editable_mode:
            self.run_command("build_ext")
        super().run()


def extension() -> Extension:
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        return Extension("sign_fast._C", SOURCES)  # never compiled: cannot_build() says why
    built: Extension = CppExtension("sign_fast._C", SOURCES, depends=[*KERNELS, *HEADERS], extra_compile_args=FLAGS)
    return built


setup(
    packages=[p for p in find_packages(include=["sign_fast", "sign_fast.*"]) if not p.startswith("sign_fast.kernels")]
    + ["sign_fast.kernels", *(f"sign_fast.kernels.{p}" for p in find_packages("kernels"))],
    package_dir={"sign_fast.kernels": "kernels"},
    package_data={
        "sign_fast": ["py.typed"],
        "sign_fast.models": ["*.json"],
        "sign_fast.training": ["*.json"],
        "sign_fast.metrics": ["digits/*"],
        "sign_fast.checkpoints": ["bundled/*/*"],
        "sign_fast.kernels": ["extension_build.json"],
    },
    include_package_data=False,
    ext_modules=[extension()],
    cmdclass={"build_ext": OptionalBuild, "build_py": BuildPy},
)

"""Builds what is compiled: the extensions, and for wheels the packs of GPU machine code. Never uses the network.

`sign_fast._C` is bound to one torch and one Python, `sign_fast._launcher` to neither; an install without either
succeeds and says why it is missing, also to `sign-fast info`, by kernels/extension_build.json. docs/wheels.md has the
environment switches. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NOTE = "kernels/extension_build.json"


def stop(message: str) -> NoReturn:
    sys.exit(f"sign_fast: {message}")


if not (3, 10) <= sys.version_info < (3, 14):
    stop(f"Python 3.10 to 3.13 is needed, this is {platform.python_version()}: use another interpreter")
if not (sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")):
    stop(
        f"x86-64 Linux is needed, this is {sys.platform} on {platform.machine()}: "
        "use such a machine, a container or WSL 2"
    )


def standalone(path: str) -> ModuleType:
    """A file that imports nothing of the package, which is not installed yet."""
    spec = importlib.util.spec_from_file_location(f"_sign_fast_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


architectures = standalone("kernels/packs/architectures.py")
objects, platform_tag = standalone("csrc/objects.py"), standalone("csrc/platform_tag.py")

# the same tree gives the same bytes: no time of day, no path of the build
os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")
SDIST = "sdist" in sys.argv
# pip and build name the hook in the command line of the process; metadata and wheel must have the same version
IN_PLACE = any(re.search("build_editable|editable_wheel|--inplace", word) for word in [*sys.argv, *sys.orig_argv])
SKIP = os.environ.get("SIGN_FAST_SKIP_EXT") == "1"
FORCE = os.environ.get("SIGN_FAST_FORCE_BUILD") == "1"
PRESETS = os.environ.get("SIGN_FAST_PRESETS", "")
for switch in ("SIGN_FAST_SKIP_EXT", "SIGN_FAST_FORCE_BUILD"):
    if os.environ.get(switch, "0") not in ("", "0", "1"):
        stop(f"{switch}={os.environ[switch]}: write 1, or leave it out")
if not re.fullmatch("[0-9]+", os.environ["SOURCE_DATE_EPOCH"]):
    stop(f"SOURCE_DATE_EPOCH={os.environ['SOURCE_DATE_EPOCH']}: seconds since 1970, such as 1767225600")
JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
if not re.fullmatch("[1-9][0-9]*", JOBS):
    stop(f"MAX_JOBS={JOBS}: how many compilers run at a time, such as MAX_JOBS=2")
try:
    ARCHS = architectures.parse(os.environ["SIGN_FAST_ARCHS"]) if os.environ.get("SIGN_FAST_ARCHS") else ()
except ValueError as error:
    stop(f"SIGN_FAST_ARCHS: {error}")
if ARCHS and IN_PLACE:
    print(
        "sign_fast: SIGN_FAST_ARCHS is for wheels: in place use `sign-fast build-cubins` and SIGN_FAST_PACKS",
        file=sys.stderr,
    )
    ARCHS = ()
if PRESETS and not ARCHS and not IN_PLACE:
    print("sign_fast: SIGN_FAST_PRESETS does nothing without SIGN_FAST_ARCHS", file=sys.stderr)
if ARCHS and importlib.util.find_spec("triton") is None:
    stop("the packs of machine code cannot be built: Triton, which compiles them, is not installed: pip install triton")
if ARCHS and PRESETS:
    known = json.loads((ROOT / "kernels/packs/calls.json").read_text())["networks"]
    wanted = re.split(r"[,;\s]+", PRESETS.strip(",; "))
    if lacking := [name for name in wanted if not any(n == name or n.startswith(f"{name}-") for n in known)]:
        names = ", ".join(known)
        stop(f"SIGN_FAST_PRESETS: unknown network {lacking[0]!r}: known are {names}, or their first parts as in digits")

LIMITED_API = [("Py_LIMITED_API", "0x030A0000")]  # Python 3.10
NAMES = {"sign_fast._C": "C++ extension", "sign_fast._launcher": "launcher of precompiled kernels"}
WITHOUT = {
    "sign_fast._C": "Everything works, slower on a CPU",
    "sign_fast._launcher": "Triton compiles at the first call instead",
}
absent: dict[str, str] = {}
"""Why an extension is not there, by its name."""


def cannot_build(name: str) -> str | None:
    """Why there will be no such extension, as far as that is known before compiling."""
    if name == "sign_fast._C" and SKIP:
        return "SIGN_FAST_SKIP_EXT=1 was set"
    if name == "sign_fast._C":
        try:
            torch_version()
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "torch":
                return "torch is not installed where it is built (install torch, then pip install --no-build-isolation)"
            return f"torch does not load where it is built: {str(error)[:80]}"
    if name == "sign_fast._launcher" and sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a free-threaded Python has no stable binary interface"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler}) was found"
    return None


def do_without(name: str, reason: str) -> None:
    """Goes on without the extension and says so, unless the build is to be complete."""
    if FORCE:
        stop(f"the {NAMES[name]} cannot be built ({reason}), and SIGN_FAST_FORCE_BUILD=1 asks for it")
    if ARCHS and name == "sign_fast._launcher":
        stop(
            f"the {NAMES[name]} cannot be built ({reason}), and SIGN_FAST_ARCHS is of no use without it: "
            "install a C++ compiler, or name one in CXX"
        )
    if ARCHS and not SKIP:
        if cannot_build("sign_fast._launcher"):
            remedy = "install a C++ compiler, or name one in CXX"
        else:
            remedy = "SIGN_FAST_SKIP_EXT=1 makes a wheel for GPUs without it"
        stop(f"the {NAMES[name]} cannot be built ({reason}); {remedy}")
    absent[name] = reason
    print(f"sign_fast: installing without the {NAMES[name]}: {reason}. {WITHOUT[name]}.", file=sys.stderr)


def torch_version() -> str:
    import torch

    return str(torch.__version__)


def version() -> str:
    """The package's, with a local part for what the wheel is bound to; by the environment alone."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "sign_fast/__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    if SDIST:
        return found[1]
    local = [] if cannot_build("sign_fast._C") else ["torch" + "".join(torch_version().split(".")[:2])]
    return "+".join(filter(None, (found[1], ".".join(local + [f"sm{a.number}" for a in ARCHS]))))


def note(folder: Path, **facts: str) -> None:
    """What was built with what, for the library and `sign-fast info`."""
    if "sign_fast._C" in absent:
        facts["skipped"] = absent["sign_fast._C"]
    else:
        facts["torch"] = torch_version()
    if "sign_fast._launcher" in absent:
        facts["launcher_skipped"] = absent["sign_fast._launcher"]
    facts["python"] = "{}.{}".format(*sys.version_info)
    folder.joinpath(NOTE).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


class BuildExtensions(build_ext):
    """A failure leaves the package without the extension."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # one folder of objects for every kind of build
        self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def run(self) -> None:
        for extension in list(self.extensions):
            if reason := cannot_build(extension.name):
                do_without(extension.name, reason)
        self.extensions = [extension for extension in self.extensions if extension.name not in absent]
        super().run()
        self.extensions = [extension for extension in self.extensions if extension.name not in absent]
        if self.inplace:
            note(ROOT)

    def build_extension(self, extension: Extension) -> None:
        try:
            if extension.name == "sign_fast._C":
                units = objects.torch_units(ROOT, torch_version(), extension.include_dirs)
            else:
                units = objects.launcher_units(ROOT, LIMITED_API)
            built = objects.compile_objects(self.compiler, units, Path(self.build_temp), int(JOBS))
            extension.extra_objects = extension.depends = built
            super().build_extension(extension)
        except Exception as error:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            extension.optional = True  # setuptools then copies nothing into the tree
            do_without(extension.name, f"compiling failed: {(str(error) or type(error).__name__)[:80]}")


class BuildPackage(build_py):
    """Builds everything else first, into the folder that becomes the wheel, and notes what that was."""

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        self.run_command("build_ext")
        super().run()
        package = Path(self.build_lib, "sign_fast")
        facts = {"platform": platform_tag.platform_tag(sorted(package.rglob("*.so")))}
        extensions = self.get_finalized_command("build_ext")
        if extensions.extensions:
            facts["compiler"] = objects.compiler_version(extensions.compiler)
        if ARCHS:
            self.build_packs(package / "kernels/packs")
            facts["architectures"] = ";".join(map(str, ARCHS))
            facts["presets"] = PRESETS or "all"
            facts["triton"] = importlib.metadata.version("triton")
        note(package, **facts)

    def build_packs(self, target: Path) -> None:
        """By the package as the wheel will have it, in a process of its own; all of the packs or none."""
        path = os.pathsep.join(filter(None, (os.path.abspath(self.build_lib), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
            command = [sys.executable, "-m", "sign_fast.cli", "build-cubins", "--archs", ";".join(map(str, ARCHS))]
            command += ["--presets", PRESETS] if PRESETS else []
            command += ["--outdir", folder, "--jobs", JOBS]
            environment["TMPDIR"] = str(Path(folder, "tmp"))  # goes with the folder, whatever happens
            Path(environment["TMPDIR"]).mkdir()
            pipe = subprocess.PIPE
            done = subprocess.run(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)
            packs = {file.name: file for file in sorted(Path(folder).glob("*.zip"))}
            lacking = [f"sm_{a.number}.zip" for a in ARCHS if f"sm_{a.number}.zip" not in packs]
            if done.returncode or lacking:
                shutil.rmtree(self.build_lib)
                told = f"exit status {done.returncode}, without {', '.join(lacking)}"
                for line in done.stderr.strip().splitlines()[-1:]:
                    told = re.sub("^(sign-fast: )?error: *", "", line, flags=re.IGNORECASE)
                stop(f"the packs of machine code cannot be built: {told}")
            for name, file in packs.items():
                shutil.copyfile(file, target / name)
                print(f"{name}: {file.stat().st_size / 2**20:.1f} MiB")


class Wheel(bdist_wheel):
    """Names a wheel by what is in it."""

    def run(self) -> None:
        # what an earlier build left there is not of this one
        for folder in (self.get_finalized_command("build").build_lib, self.bdist_dir):
            shutil.rmtree(folder, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if IN_PLACE:
            return super().get_tag()
        libraries = sorted(Path(self.bdist_dir).rglob("*.so"))
        if not libraries:
            return "py3", "none", platform_tag.PLAIN
        # the launcher alone serves every Python from 3.10 on
        self.py_limited_api = False if any(file.name.startswith("_C.") for file in libraries) else "cp310"
        python, abi, system = super().get_tag()
        return python, abi, system if self.plat_name_supplied else platform_tag.platform_tag(libraries)


def extensions() -> list[Extension]:
    launcher = Extension(
        "sign_fast._launcher", [], define_macros=LIMITED_API, libraries=["dl"], language="c++", py_limited_api=True
    )
    if SDIST or cannot_build("sign_fast._C"):
        return [Extension("sign_fast._C", []), launcher]  # the first is never compiled: cannot_build() says why
    from torch.utils.cpp_extension import CppExtension

    return [CppExtension("sign_fast._C", []), launcher]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One build of a tree at a time."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("sign_fast: waiting for another build of this tree", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


with alone():
    setup(
        version=version(),
        packages=[
            *(p for p in find_packages(include=["sign_fast", "sign_fast.*"]) if not p.startswith("sign_fast.kernels")),
            *("sign_fast.kernels", *(f"sign_fast.kernels.{p}" for p in find_packages("kernels"))),
        ],
        package_dir={"sign_fast.kernels": "kernels"},
        package_data={
            "sign_fast": ["py.typed", "*.pyi"],
            "sign_fast.models": ["*.json"],
            "sign_fast.training": ["*.json"],
            "sign_fast.distill": ["recipes/*.json"],
            "sign_fast.metrics": ["digits/*"],
            "sign_fast.checkpoints": ["bundled/*/*"],
            "sign_fast.kernels.packs": ["*.json"],  # the packs of a source tree are its own
        },
        include_package_data=False,
        ext_modules=extensions(),
        options={} if SDIST else {"egg_info": {"egg_base": "build"}},  # the tree's own stays out of the import path
        cmdclass={"build_ext": BuildExtensions, "build_py": BuildPackage, "bdist_wheel": Wheel},
    )

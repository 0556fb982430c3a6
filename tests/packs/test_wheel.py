"""Wheels for deployment: built without a GPU, named by their contents, the same bytes twice, run without a compiler.

The wheel with real packs, of some of the digits' calls, is built once for all processes of the tests and once more to
compare; everything else is tried where a stand-in writes the packs. All of it in copies of the tree, with its objects.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sign_fast
from csrc import objects, platform_tag  # a folder of the tree, not of the package
from sign_fast.kernels.packs import build as builder
from sign_fast.kernels.packs import calls, elf
from sign_fast.kernels.packs.devices import devices
from sign_fast.kernels.packs.store import Pack
from tests.test_packaging import ROOT, build_environment, copy_tree

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="build is not installed"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here"),
    pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="a free-threaded Python"),
]

TORCH = "torch" + "".join(torch.__version__.split(".")[:2])
PYTHON = "cp{}{}".format(*sys.version_info)
STAND_IN = """
import argparse, os, sys, zipfile
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["build-cubins"])
for option in ("archs", "presets", "outdir", "jobs"):
    parser.add_argument(f"--{option}")
options = parser.parse_args()
if "sign_fast" in os.listdir() or "build/lib" not in __file__:
    sys.exit("this is not the package as the wheel has it")
if not Path(__file__).parents[1].joinpath("_launcher.abi3.so").exists():
    sys.exit("the packs come before the launcher")
for arch in options.archs.split(";"):
    with zipfile.ZipFile(Path(options.outdir, "sm_" + arch.replace("+PTX", "").replace(".", "") + ".zip"), "w") as pack:
        pack.writestr(zipfile.ZipInfo("options"), f"{arch} {options.presets} {options.jobs}")
    if os.environ.get("STAND_IN") == "broken":
        sys.exit("noise\\nError: 'broken' is no preset: write SIGN_FAST_PRESETS=digits")
if os.environ.get("STAND_IN") == "damaged":
    Path(options.outdir, "sm_90.zip").unlink()
"""
NO_NETWORK = """
import socket
def refuse(*arguments):
    raise AssertionError("a build that uses the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def build(tree, out, *words, **switches):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *(words or ["--wheel"])]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=build_environment(**switches))


def built(tree, out, *words, **switches):
    done = build(tree, out, *words, **switches)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("sign_fast-*"))


def note(wheel):
    return json.loads(zipfile.ZipFile(wheel).read("sign_fast/kernels/extension_build.json"))


def told(done):
    """The lines that say what is wrong, among those of the build's front end."""
    return [line for line in done.stderr.splitlines() if line.startswith("sign_fast: ")]


@pytest.fixture
def tree(tmp_path):
    copy = copy_tree(tmp_path / "tree")
    (copy / "sign_fast/cli/__main__.py").write_text(STAND_IN)
    return copy


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    """The wheel for sm_80 and sm_90 with packs of the digits; one for all test processes."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "deployed"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "failed").exists() and not list(folder.glob("*.whl")):
            (folder / "failed").touch()
            deploy(folder, folder / "tree")
            (folder / "failed").unlink()
        assert not (folder / "failed").exists(), "building it failed in another process of the tests"
    return next(folder.glob("*.whl"))


def deploy(out, tree):
    """A wheel with the packs of every operator's first call and of some more."""
    path = copy_tree(tree) / "kernels/packs/calls.json"
    known = calls.from_json(path.read_text())
    for name in ("digits-uncond", "digits-cond"):
        known[name] = list({call.operator: call for call in reversed(known[name])}.values()) + known[name][::24]
    path.write_text(calls.to_json(known))
    switches = {"SIGN_FAST_ARCHS": "8.0;9.0", "SIGN_FAST_PRESETS": "digits", "TRITON_CACHE_DIR": str(out / "triton")}
    return built(tree, out, **switches)


def test_its_name_says_what_it_is_for(deployed):
    name = (
        rf"sign_fast-{sign_fast.__version__}\+{TORCH}\.sm80\.sm90-{PYTHON}-{PYTHON}-(manylinux_2_\d+|linux)_x86_64\.whl"
    )
    assert re.fullmatch(name, deployed.name)
    metadata = zipfile.ZipFile(deployed).read(f"{'-'.join(deployed.name.split('-')[:2])}.dist-info/METADATA").decode()
    assert f"Version: {sign_fast.__version__}+{TORCH}.sm80.sm90\n" in metadata
    assert not re.search("Requires-Dist: triton(?!.*extra)", metadata)


def test_its_contents(deployed):
    archive = zipfile.ZipFile(deployed)
    names = archive.namelist()
    assert len(names) == len(set(names))
    packs = [name for name in names if name.endswith(".zip")]
    assert packs == ["sign_fast/kernels/packs/sm_80.zip", "sign_fast/kernels/packs/sm_90.zip"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiled = [name for name in names if name.endswith(".so")]
    assert compiled == [f"sign_fast/_C{suffix}", "sign_fast/_launcher.abi3.so"]
    strange = ("kernels/", "tests/", "csrc/", "benchmarks/", "build/", "docs/")
    assert not [name for name in names if name.startswith(strange) or name.endswith((".cpp", ".h", ".pyc", ".o"))]
    for name in names:
        for place in (ROOT, deployed.with_name("tree")):
            assert str(place).encode() not in archive.read(name), f"{name} tells where it was built"
    facts = note(deployed)
    assert facts.pop("compiler") and deployed.name.endswith(f"-{facts.pop('platform')}.whl")
    assert facts == {
        "torch": torch.__version__,
        "python": "{}.{}".format(*sys.version_info),
        "architectures": "8.0;9.0",
        "presets": "digits",
        "triton": importlib.metadata.version("triton"),
    }


def test_its_packs_are_whole(deployed, tmp_path):
    """All of their variants: ELF architecture, symbol, registers, parameters, and none missing for the networks."""
    zipfile.ZipFile(deployed).extractall(tmp_path)
    known = calls.from_json((tmp_path / "sign_fast/kernels/packs/calls.json").read_text())
    for name, architecture in (("sm_80", 80), ("sm_90", 90)):
        pack = Pack(tmp_path / f"sign_fast/kernels/packs/{name}.zip")
        assert pack.architecture == architecture and pack.networks == ["digits-uncond", "digits-cond"]
        assert pack.current == pack.kernels and len(pack.kernels) > 10
        for key in pack.keys:
            variant = pack.find(key)
            image = pack.image(variant)  # and its hash is right
            assert elf.architecture(image) == architecture
            # beside the kernel there may be what the assembler calls for a root or a division
            assert [n for n in elf.symbols(image) if not n.startswith("$__internal_")] == [variant.symbol]
            assert elf.registers(image, variant.symbol) == variant.registers
            assert elf.parameter_sizes(image, variant.symbol) == bytes(variant.parameter_sizes)
        needed = builder.needs([call for n in pack.networks for call in known[n]], devices(architecture)[:1])
        assert {need.key for need in needed} <= set(pack.keys)


IN_THE_VENV = """
import sys, torch
from sign_fast._launcher import Launcher
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs import calls, dispatch
call = next(c for c in calls.networks()["digits-uncond"] if c.operator == "group_norm_silu")
(launch,) = call.launches(4, KNOWN[90])
memory = {
    name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, torch.Tensor) else t
    for name, t in launch.arguments.items()
}
launch = Launch(launch.kernel, launch.grid, memory, launch.constants, launch.num_warps)
packs = dispatch.DevicePacks(0, 90, dispatch.usable(90), Launcher(sys.argv[1]))
assert packs.launch(launch, 7), packs.misses
assert "triton" not in sys.modules
print(packs.hits)
"""


def test_its_packs_are_launched_where_there_is_no_triton(deployed, empty, driver_library, tmp_path):
    programs, environment = empty
    install(programs, deployed)
    command = [str(programs / "python"), "-c", IN_THE_VENV, str(driver_library)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "forward_tile" in done.stdout, done.stderr


def test_the_same_tree_gives_the_same_bytes(deployed, tmp_path):
    again = deploy(tmp_path, tmp_path / "tree")
    assert again.name == deployed.name
    one, other = zipfile.ZipFile(deployed), zipfile.ZipFile(again)
    assert one.namelist() == other.namelist()
    assert not [name for name in one.namelist() if one.read(name) != other.read(name)]
    assert again.read_bytes() == deployed.read_bytes()


@pytest.mark.parametrize("which", ["deployed", "launcher alone"])
def test_its_platform_tag_is_what_auditwheel_says(which, request, tree, tmp_path):
    wheel_abi = pytest.importorskip("auditwheel.wheel_abi")
    if which == "deployed":
        wheel = request.getfixturevalue("deployed")
    else:
        wheel = built(tree, tmp_path / "out", SIGN_FAST_SKIP_EXT="1")
    exclude = frozenset(("libtorch*", "libc10*", "libgomp*"))
    found = wheel_abi.analyze_wheel_abi(None, None, wheel, exclude, disable_isa_ext_check=False, allow_graft=True)
    theirs, ours = found.overall_policy.name, wheel.stem.split("-")[-1]
    if ours == "linux_x86_64":
        assert theirs == ours
        return
    # ours has the glibc itself, theirs the first of their policies that allows it
    known = Path(wheel_abi.__file__).with_name("policy").joinpath("manylinux-policy.json").read_text()
    policies = [int(glibc) for glibc in re.findall(r'"name": "manylinux_2_(\d+)"', known)]
    expected = min(glibc for glibc in policies if glibc >= int(ours.split("_")[2]))
    assert theirs == f"manylinux_2_{expected}_x86_64"


def test_a_platform_tag_by_what_is_needed(tmp_path):
    def tag(*words, code="", name="lib.so"):
        (tmp_path / "code.cpp").write_text(code)
        command = ["c++", "-shared", "-fPIC", "code.cpp", "-o", name, "-Wl,--no-as-needed", *words]
        subprocess.run(command, check=True, cwd=tmp_path)
        return platform_tag.platform_tag([tmp_path / name])

    assert platform_tag.platform_tag([]) == "linux_x86_64"
    old = tag(code="int f() { return 1; }")
    assert int(old.split("_")[2]) < 17
    own = tmp_path / "libown.so"
    tag("-Wl,-soname,libown.so", code="int own() { return 1; }", name="libown.so")
    assert tag(str(own), code="int own(); int f() { return own(); }") == "linux_x86_64"
    assert platform_tag.obstacle([tmp_path / "lib.so"]) == "lib.so needs libown.so"
    for damaged in (b"", b"text", own.read_bytes()[:100]):
        (tmp_path / "damaged.so").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.so is"):
            platform_tag.platform_tag([tmp_path / "damaged.so"])


@pytest.mark.parametrize(
    ("version", "glibc"),
    [
        ("GLIBC_2.2.5", 2),
        ("GLIBC_2.34", 34),
        ("GLIBC_PRIVATE", None),
        ("GLIBC_ABI_DT_RELR", 36),
        ("GLIBCXX_3.4", 5),
        ("GLIBCXX_3.4.19", 17),
        ("GLIBCXX_3.4.21", 24),
        ("GLIBCXX_3.4.30", 35),
        ("GLIBCXX_3.4.99", None),
        ("CXXABI_1.3", 5),
        ("CXXABI_1.3.11", 27),
        ("CXXABI_TM_1", 17),
        ("GCC_3.0", 5),
        ("GCC_4.8.0", 17),
        ("GCC_12.0.0", 35),
        ("OPENSSL_1.1.0", None),
    ],
)
def test_the_policy_that_has_a_symbol_version(version, glibc):
    assert platform_tag._glibc(version) == glibc


def link_dependencies(site):
    """What the package needs at run time, from this interpreter's folders, without Triton."""
    needed, seen = ["torch", "numpy", "pillow", "safetensors", "click", "tqdm"], {"triton", "sign-fast"}
    while needed:
        name = re.split(r"[^\w.-]", needed.pop())[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or Python
        needed += [line for line in found.requires or () if "extra ==" not in line]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not site.joinpath(top).exists():
                site.joinpath(top).symlink_to(found.locate_file(top))


@pytest.fixture
def empty(tmp_path):
    """The programs of an empty virtual environment, and an environment in which there are no others."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = subprocess.run(
        [home / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    link_dependencies(Path(site))
    return home / "bin", {"PATH": str(home / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


def install(programs, wheel):
    command = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def images(folder):
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.rglob("*.png"))}


def test_installed_where_there_is_no_compiler_and_no_triton(deployed, empty, tmp_path):
    pytest.importorskip("pip")
    programs, environment = empty
    install(programs, deployed)

    def run(*words):
        return subprocess.run([str(w) for w in words], cwd=tmp_path, capture_output=True, text=True, env=environment)

    for program in ("c++", "g++", "cc", "gcc", "clang", "nvcc", "ptxas", "ninja"):
        assert shutil.which(program, path=environment["PATH"]) is None
    absent = run(programs / "python", "-c", "import triton")
    assert absent.returncode == 1 and "No module named 'triton'" in absent.stderr
    where = run(programs / "python", "-c", "import sign_fast, sign_fast._launcher as l; print(l.__file__)")
    assert str(programs.parent) in where.stdout, where.stderr
    words = ["generate", "--network", "digits-uncond", "--seeds", "0-15", "--grid"]
    done = run(programs / "sign-fast", *words, "there/grid.png", "--outdir", "there")
    assert done.returncode == 0, done.stderr
    assert "slower path" not in done.stderr
    here = [sys.executable, "-m", "sign_fast.cli", *words, str(tmp_path / "here/grid.png")]
    here += ["--outdir", str(tmp_path / "here")]
    subprocess.run(here, cwd=ROOT, check=True, env=build_environment(OMP_NUM_THREADS="1"), capture_output=True)
    ours, theirs = images(tmp_path / "here"), images(tmp_path / "there")
    assert ours.keys() == theirs.keys() and len(ours) == 17
    assert all(np.abs(ours[name] - theirs[name]).max() <= 1 for name in ours)
    info = run(programs / "sign-fast", "info", "--json")
    assert info.returncode == 0, info.stderr
    facts = json.loads(info.stdout)
    assert facts["C++ extension"]["loaded"] == "yes" and facts["versions"]["triton"] == "not installed"


def test_beside_another_torch_it_says_so_in_one_sentence(deployed, tmp_path):
    zipfile.ZipFile(deployed).extractall(tmp_path)
    code = (
        "import torch; torch.__version__ = '2.9.1'; "
        "from sign_fast import ImageGenerator; from sign_fast.kernels import extension; print(extension.missing()); "
        "assert ImageGenerator.from_pretrained('digits-uncond', 'cpu')([0]).shape == (1, 8, 8, 1)"
    )
    environment = build_environment(PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = f"the C++ extension was built with torch {torch.__version__}, this is 2.9.1; install a wheel that"
    assert done.stdout.startswith(expected) and done.stdout.count("\n") == 1
    assert "undefined symbol" not in done.stderr


def test_without_the_extension_one_wheel_serves_every_python_and_torch(tree, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(NO_NETWORK)
    switches = {"SIGN_FAST_ARCHS": "9.0a+PTX sm_80", "SIGN_FAST_SKIP_EXT": "1", "SIGN_FAST_PRESETS": "digits"}
    for stale in (f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}", "bdist.linux-x86_64/wheel"):
        (tree / "build" / stale / "sign_fast/kernels/packs").mkdir(parents=True)
        (tree / "build" / stale / "sign_fast/stale.py").touch()
        (tree / "build" / stale / "sign_fast/kernels/packs/sm_120.zip").touch()
    (tree / "kernels/packs/sm_86.zip").touch()  # of the tree, by `sign-fast build-cubins`
    wheel = built(tree, tmp_path / "out", PYTHONPATH=str(tmp_path / "path"), MAX_JOBS="3", **switches)
    tag = r"cp310-abi3-(manylinux_2_\d+|linux)_x86_64"
    assert re.fullmatch(rf"sign_fast-{sign_fast.__version__}\+sm80\.sm90-{tag}\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert [name for name in names if name.endswith(".so")] == ["sign_fast/_launcher.abi3.so"]
    packs = [name for name in names if name.endswith(".zip")]
    assert packs == ["sign_fast/kernels/packs/sm_80.zip", "sign_fast/kernels/packs/sm_90.zip"]
    assert "sign_fast/stale.py" not in names
    assert zipfile.ZipFile(archive.open(packs[1])).read("options") == b"9.0+PTX digits 3"
    facts = note(wheel)
    assert facts["skipped"] == "SIGN_FAST_SKIP_EXT=1 was set" and "torch" not in facts
    assert facts["architectures"] == "8.0;9.0+PTX" and "launcher_skipped" not in facts
    assert not (tree / "kernels/extension_build.json").exists() and not list(tree.glob("*.egg-info"))


def test_objects_are_compiled_once(tmp_path, monkeypatch):
    build_ext = pytest.importorskip("setuptools.command.build_ext")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.h").write_text("int one();")
    (tmp_path / "csrc/a.cpp").write_text('#include "a.h"\nint one() { return ONE; }')
    (tmp_path / "csrc/b.cpp").write_text("int two() { return 2; }")
    compiler = build_ext.new_compiler()
    build_ext.customize_compiler(compiler)
    compiled, compile_one = [], compiler.compile

    def count(sources, **options):
        compiled.extend(sources)
        return compile_one(sources, **options)

    compiler.compile = count

    def run(one="1", flags=("-O0", "-ffile-prefix-map=/a=b"), jobs=2):
        compiled.clear()
        units = [objects.Unit(f"csrc/{name}.cpp", name, flags, [("ONE", one)], []) for name in "ab"]
        found = objects.compile_objects(compiler, units, Path("build"), jobs)
        assert found == ["build/a/csrc/a.o", "build/b/csrc/b.o"] and all(Path(file).exists() for file in found)
        return sorted(compiled)

    assert run() == ["csrc/a.cpp", "csrc/b.cpp"]
    assert run() == run(flags=("-O0", "-ffile-prefix-map=/another=b")) == []
    assert run(one="1 ") == run(flags=("-O1",)) == ["csrc/a.cpp", "csrc/b.cpp"]
    os.utime(tmp_path / "csrc/a.h", (2**32, 2**32))
    assert run(flags=("-O1",)) == ["csrc/a.cpp"]
    os.utime(tmp_path / "csrc/a.h", (1, 1))
    Path("build/b/csrc/b.o").unlink()
    assert run(flags=("-O1",)) == ["csrc/b.cpp"]
    with pytest.raises(RuntimeError, match=r"csrc/a\.cpp does not compile"):
        run(one="no number", jobs=1)
    assert run() == ["csrc/a.cpp", "csrc/b.cpp"]


def test_the_launcher_alone_loads_in_every_python_here(tree, tmp_path):
    others = [shutil.which(f"python3.{minor}") for minor in range(10, 14)]
    wheel = built(tree, tmp_path / "out", SIGN_FAST_SKIP_EXT="1")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import sys, sign_fast._launcher as l; l.Launcher(); print(sys.version_info.major, 'torch' in sys.modules)"
    for python in filter(None, [sys.executable, *others]):
        if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]).returncode:
            continue  # a name without the Python behind it
        environment = build_environment(PYTHONPATH=str(tmp_path / "site"))
        done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.stdout == "3 False\n", done.stderr


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"SIGN_FAST_ARCHS": "7.5"}, "SIGN_FAST_ARCHS: '7.5' is older than 8.0"),
        ({"SIGN_FAST_ARCHS": "8.0;hopper9"}, "SIGN_FAST_ARCHS: 'hopper9' is not an architecture"),
        ({"SIGN_FAST_ARCHS": "8.0", "MAX_JOBS": "many"}, "MAX_JOBS=many"),
        ({"SIGN_FAST_ARCHS": "8.0", "SIGN_FAST_PRESETS": "digits;foo"}, "SIGN_FAST_PRESETS: unknown network 'foo'"),
        ({"SIGN_FAST_ARCHS": "8.0", "SIGN_FAST_PRESETS": " "}, "SIGN_FAST_PRESETS: unknown network ''"),
        ({"SIGN_FAST_FORCE_BUILD": "yes"}, "SIGN_FAST_FORCE_BUILD=yes: write 1, or leave it out"),
        ({"SOURCE_DATE_EPOCH": "yesterday"}, "SOURCE_DATE_EPOCH=yesterday: seconds since 1970"),
        (
            {"SIGN_FAST_ARCHS": "8.0", "STAND_IN": "broken"},
            "the packs of machine code cannot be built: 'broken' is no preset: write SIGN_FAST_PRESETS=digits",
        ),
        (
            {"SIGN_FAST_ARCHS": "8.0;9.0", "STAND_IN": "damaged"},
            "the packs of machine code cannot be built: exit status 0, without sm_90.zip",
        ),
        (
            {"SIGN_FAST_ARCHS": "8.0", "CXX": "no-such-compiler", "PATH": "/nowhere"},
            "the launcher of precompiled kernels cannot be built (no C++ compiler (no-such-compiler) was found), and",
        ),
        (
            {"SIGN_FAST_FORCE_BUILD": "1", "CXX": "no-such-compiler", "PATH": "/nowhere"},
            "the launcher of precompiled kernels cannot be built (no C++ compiler (no-such-compiler) was found), and",
        ),
        ({"SIGN_FAST_FORCE_BUILD": "1"}, "the C++ extension cannot be built (SIGN_FAST_SKIP_EXT=1 was set), and"),
    ],
)
def test_refused_in_one_line(switches, expected, tree, tmp_path):
    switches = {"SIGN_FAST_SKIP_EXT": "1", **switches}
    if "CXX" in switches and "SIGN_FAST_FORCE_BUILD" in switches:
        switches["SIGN_FAST_SKIP_EXT"] = ""
        expected = "the C++ extension cannot be built (no C++ compiler (no-such-compiler) was found), and"
    done = build(tree, tmp_path / "out", **switches)
    assert done.returncode != 0
    lines = [line for line in told(done) if "installing without" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"sign_fast: {expected}"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*")) and not list(tree.glob("build/lib*"))
    assert not [path for path in tree.glob("build/*") if path.name.startswith("tmp")]


def test_an_extension_that_does_not_compile(tree, tmp_path):
    (tree / "csrc/extension.cpp").write_text("this is no C++")
    done = build(tree, tmp_path / "out", SIGN_FAST_ARCHS="8.0")
    assert done.returncode != 0 and not list((tmp_path / "out").glob("*"))
    (line,) = told(done)
    assert "the C++ extension cannot be built (compiling failed: csrc/extension.cpp does not compile)" in line
    assert "SIGN_FAST_SKIP_EXT=1 makes a wheel for GPUs without it" in line
    wheel = built(tree, tmp_path / "out")  # without packs it is an ordinary install, which succeeds
    assert (
        "cp310-abi3" in wheel.name and note(wheel)["skipped"] == "compiling failed: csrc/extension.cpp does not compile"
    )


def test_a_wheel_comes_from_an_sdist(tree, tmp_path):
    sdist = built(tree, tmp_path / "sdist", "--sdist", SIGN_FAST_ARCHS="8.0")
    assert sdist.name == f"sign_fast-{sign_fast.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked")
    launcher = {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/launcher/*.*")}
    assert launcher <= names and {"csrc/extension.cpp", "setup.py", "kernels/packs/architectures.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".zip", ".pyc", "extension_build.json"))]
    unpacked = next((tmp_path / "unpacked").iterdir())
    shutil.copytree(tree / "build", unpacked / "build", ignore=shutil.ignore_patterns("lib*", "bdist*"))
    wheel = built(unpacked, tmp_path / "wheel", SIGN_FAST_ARCHS="8.0", SIGN_FAST_SKIP_EXT="1")
    assert wheel.name.startswith(f"sign_fast-{sign_fast.__version__}+sm80-cp310-abi3-")
    direct = built(tree, tmp_path / "direct", SIGN_FAST_ARCHS="8.0", SIGN_FAST_SKIP_EXT="1")
    assert zipfile.ZipFile(direct).namelist() == zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize(
    ("hook", "local"),
    [
        ("prepare_metadata_for_build_wheel", f"+{TORCH}.sm80.sm120"),
        ("prepare_metadata_for_build_editable", f"+{TORCH}"),
    ],
)
def test_metadata_that_is_asked_for_first_has_the_same_version(hook, local, tree, tmp_path):
    code = f"import setuptools.build_meta as backend; print(backend.{hook}({str(tmp_path)!r}))"
    environment = build_environment(SIGN_FAST_ARCHS="12.0;8.0")
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"sign_fast-{sign_fast.__version__}{local}.dist-info"


def test_an_editable_install_has_no_packs_and_says_so(tree, tmp_path):
    code = f"import setuptools.build_meta as backend; print(backend.build_editable({str(tmp_path)!r}))"
    environment = build_environment(SIGN_FAST_ARCHS="8.0", SIGN_FAST_SKIP_EXT="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    line = "sign_fast: SIGN_FAST_ARCHS is for wheels: in place use `sign-fast build-cubins` and SIGN_FAST_PACKS"
    assert told(done)[0] == line and done.stderr.count(line) == 1
    assert "+sm" not in done.stdout.splitlines()[-1]
    assert (tree / "sign_fast/_launcher.abi3.so").exists() and not list(tree.glob("kernels/packs/*.zip"))
    facts = json.loads((tree / "kernels/extension_build.json").read_text())
    assert facts["skipped"] == "SIGN_FAST_SKIP_EXT=1 was set"

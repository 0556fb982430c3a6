"""Files made to harm: nothing of them runs, and each ends in one line, in bounded time and memory."""

from __future__ import annotations

import builtins
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sign_fast import models
from sign_fast.checkpoints.published import read_snapshot
from sign_fast.errors import SignFastError
from tests.checkpoints import hostile
from tests.checkpoints.snapshots import tiny, tiny_snapshot


def _load(path: Path, data: bytes) -> str | None:
    """The one line, or None where it loads. Any other error, and any trace, fails the test."""
    path.write_bytes(data)
    try:
        models.load(path, "cpu")
        message = None
    except SignFastError as error:
        message = str(error)
        assert message.startswith(str(path)) and len(message) < len(str(path)) + 600, message
        assert message.isprintable(), repr(message)
    assert not hasattr(builtins, hostile.TRACE) and not Path(hostile.TRACE_FILE).exists()
    return message


def test_source_in_a_snapshot_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, data in hostile.harmless():
        assert _load(tmp_path / "x.pkl", data) is None


_WATCHED = """
import builtins, json, os, resource, sys, torch
from pathlib import Path
from sign_fast import models
from sign_fast.errors import SignFastError

folder = Path(sys.argv[1])
paths = sorted(folder.glob("*.pkl"))
def load(path):
    try:
        models.load(path, "cpu")
        return None
    except SignFastError as error:
        return str(error)
for _ in range(2):  # what our own code imports when it is first needed
    for path in sorted((folder / "first").glob("*.pkl")):
        load(path)

events, armed = [], True
def watch(event, args):
    if not armed:
        return
    if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
        if not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    if event in WATCHED or event.partition(".")[0] in WATCHED_MODULES:
        events.append([event, repr(args)[:200]])
WATCHED = {"open", "exec", "compile", "import", "code.__new__", "builtins.input", "pickle.find_class",
           "object.__setattr__", "object.__delattr__", "sys.addaudithook", "os.system", "function.__new__"}
WATCHED_MODULES = {"os", "subprocess", "socket", "shutil", "ctypes", "marshal", "webbrowser", "tempfile", "pty"}
HARMLESS = {"os.listdir", "os.scandir"}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))  # a bomb ends as a MemoryError
sys.addaudithook(watch)
exec("pass"), os.system("true"), open(os.devnull, "w").close()
assert {"exec", "os.system", "open"} <= {event for event, _ in events}, events  # the watch sees
events.clear()
results = {path.name: load(path) for path in paths}
armed = False
print(json.dumps({"results": results, "events": [e for e in events if e[0] not in HARMLESS]}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_each_ends_in_its_line_and_nothing_is_executed_written_or_imported(tmp_path):
    """All of them in one process whose every call to the system is watched, with a gigabyte to spend."""
    first = tmp_path / "first"
    first.mkdir()
    good = tiny_snapshot(zip_storages=True)
    for i, data in enumerate([good, good[:1000], b"\x80\4I.", good[:-1] + b"c", hostile.harmless()[0][1]]):
        (first / f"{i}.pkl").write_bytes(data)
    cases = hostile.cases()
    everything = [*((name, data, line) for name, data, line in cases), *((n, d, None) for n, d in hostile.harmless())]
    for i, (_, data, _) in enumerate(everything):
        (tmp_path / f"{i:04}.pkl").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["events"] == []
    assert not (tmp_path / hostile.TRACE_FILE).exists()
    messages = {name: report["results"][f"{i:04}.pkl"] for i, (name, _, _) in enumerate(everything)}
    for name, _, line in everything:
        message = messages[name]
        if line is None:
            assert message is None, name
            continue
        assert message is not None, f"{name} loads"
        assert message.isprintable() and len(message) < len(str(tmp_path)) + 600, (name, message)
        assert re.search(line, message) and "memory" not in message, (name, message)


@pytest.mark.parametrize("written", [{"protocol": 4}, {"protocol": 2, "zip_storages": True}], ids=["plain", "zip"])
def test_cut_at_every_kilobyte(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tiny_snapshot(**written)
    step = 1024 if "zip_storages" not in written else 4096
    for size in {*range(1, len(data), step), len(data) - 1}:
        message = _load(tmp_path / "x.pkl", data[:size])
        assert message is not None and "\n" not in message


@pytest.mark.parametrize("written", [{"protocol": 4}, {"protocol": 2, "zip_storages": True}], ids=["plain", "zip"])
def test_changed_bytes(written, tmp_path, monkeypatch):
    """A changed value of a weight loads; whatever else is changed ends in one line."""
    monkeypatch.chdir(tmp_path)
    data, net = tiny_snapshot(**written), tiny()
    draw = random.Random(0)
    path = tmp_path / "x.pkl"
    refused = 0
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(len(data))
            if draw.random() < 0.3:
                del changed[at : at + draw.choice([1, 4, 100])]
            elif draw.random() < 0.3:
                changed[at:at] = draw.randbytes(draw.choice([1, 4]))
            else:
                changed[min(at, len(changed) - 1)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            read_snapshot(path).state(net)
        except SignFastError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused > 25  # most bytes are not a weight's
    assert not hasattr(builtins, hostile.TRACE) and not Path(hostile.TRACE_FILE).exists()

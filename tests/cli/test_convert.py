"""sign-fast convert: snapshots and folders in, folders out."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import pytest
import torch

import sign_fast
from sign_fast import ImageGenerator, models
from tests.checkpoints import hostile
from tests.checkpoints.snapshots import TINY, persistent, tiny, tiny_snapshot, write_snapshot
from tests.cli.test_generate import run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _equal(got: models.Precond, want: models.Precond) -> None:
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


def test_snapshot_to_folder_to_folder(capfd):
    data = tiny_snapshot()
    Path("network-snapshot-1.200000-403968.pkl").write_bytes(data)
    status, out, err = run(capfd, "convert", "network-snapshot-1.200000-403968.pkl", "out/sid")
    assert status == 0 and not err and out.startswith("EDMPrecond, 0.0 million values, a student, as its name")
    assert sorted(_tree(Path("out"))) == ["sid/README.md", "sid/config.json", "sid/model.safetensors"]
    _equal(models.load("out/sid", "cpu"), tiny())
    config = json.loads(Path("out/sid/config.json").read_text())
    assert config["role"] == "student" and config["sampling"] == {"steps": 1, "sigma": 2.5}
    assert config["kwargs"] == TINY
    digest = hashlib.sha256(data).hexdigest()
    assert config["source"]["sha256"] == digest and config["source"]["entry"] == "ema"
    card = Path("out/sid/README.md").read_text()
    assert digest in card and "network-snapshot-1.200000-403968.pkl" in card and card.startswith("---\nlibrary_name")
    status, _, _ = run(capfd, "convert", "out/sid", "again/sid")
    assert status == 0 and _tree(Path("again/sid")) == _tree(Path("out/sid"))
    generator = ImageGenerator.from_pretrained("again/sid", "cpu")
    assert generator.role == "student" and generator.default_steps == 1
    assert torch.equal(generator([3]), ImageGenerator(models.load("out/sid", "cpu"))([3]))


def test_half_precision_weights_come_back_exactly(capfd):
    net = tiny().half()
    Path("edm-x.pkl").write_bytes(write_snapshot({"ema": persistent(net, TINY)}))
    assert run(capfd, "convert", "edm-x.pkl", "out")[0] == 0
    for name, value in models.load("out", "cpu").state_dict().items():
        assert torch.equal(value.half(), net.state_dict()[name]) and value.dtype == torch.float32


def test_role_key_and_sampling(capfd):
    Path("x.pkl").write_bytes(write_snapshot({"ema": persistent(tiny(1), TINY), "G": persistent(tiny(2), TINY)}))
    status, _, err = run(capfd, "convert", "x.pkl", "out")
    assert status == 1 and "say --role teacher or --role student" in err and not Path("out").exists()
    assert run(capfd, "convert", "x.pkl", "out", "--role", "teacher", "--key", "G")[0] == 0
    config = json.loads(Path("out/config.json").read_text())
    assert config["role"] == "teacher" and "sampling" not in config and config["source"]["entry"] == "G"
    _equal(models.load("out", "cpu"), tiny(2))
    assert run(capfd, "convert", "x.pkl", "out", "--role", "student", "--steps", "4", "--sigma", "3")[0] == 0
    assert json.loads(Path("out/config.json").read_text())["sampling"] == {"steps": 4, "sigma": 3.0}
    assert run(capfd, "convert", "out", "two", "--steps", "2")[0] == 0
    assert json.loads(Path("two/config.json").read_text())["sampling"] == {"steps": 2, "sigma": 3.0}
    assert run(capfd, "convert", "out", "teacher", "--role", "teacher")[0] == 0
    assert "sampling" not in json.loads(Path("teacher/config.json").read_text())
    assert run(capfd, "convert", "digits-sign", "sign")[0] == 0
    assert ImageGenerator.from_pretrained("sign", "cpu").sampler == "recursive"


def test_bad_input_leaves_everything_as_it_was(capfd):
    Path("x.pkl").write_bytes(tiny_snapshot())
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years")
    run(capfd, "convert", "x.pkl", "net", "--role", "teacher")
    Path("cut.pkl").write_bytes(tiny_snapshot()[:5000])
    Path("evil.pkl").write_bytes(next(data for name, data, _ in hostile.cases() if name == "calls os.system"))
    Path("text.txt").write_text("x")
    before = _tree(Path("."))
    for arguments, line in (
        (("x.pkl", "mine", "--role", "teacher"), "mine holds thesis.tex: name an empty folder"),
        (("x.pkl", "text.txt", "--role", "teacher"), "text.txt is a file: name a folder"),
        (("x.pkl", ".", "--role", "teacher"), "name an empty folder, a new one"),
        (("net", "net"), "net is the network itself"),
        (("net", "new", "--key", "ema"), "--key names an entry of a published snapshot"),
        (("x.pkl", "new", "--role", "teacher", "--key", "G"), "holds 'ema'; 'G' is no network"),
        (("cut.pkl", "new"), "cut.pkl is truncated: fetch it again"),
        (("cut.pkl", "net"), "cut.pkl is truncated"),
        (("evil.pkl", "new"), "evil.pkl names os.system, which no published network needs"),
        (("text.txt", "new"), "text.txt is a file: a network is"),
        (("nowhere.pkl", "new"), "no file 'nowhere.pkl'"),
        (("x.pkl", "new", "--role", "teacher", "--sigma", "2"), "--sigma is the input noise level of a student"),
        (("x.pkl", "new", "--role", "student", "--sigma", "nan"), "--sigma must be a finite number"),
        (("digits-sign", "new", "--role", "teacher"), "cannot be a teacher"),
        (("x.pkl", "text.txt/new", "--role", "teacher"), "cannot write"),
    ):
        status, out, err = run(capfd, "convert", *arguments)
        assert status == 1 and not out and err.count("\n") == 1 and line in err, (arguments, err)
        assert _tree(Path(".")) == before, arguments
    assert run(capfd, "convert", "x.pkl")[0] == 2


def test_generate_and_distill_take_snapshots(capfd):
    Path("edm-tiny.pkl").write_bytes(tiny_snapshot())
    assert (
        run(capfd, "generate", "--network", "edm-tiny.pkl", "--outdir", "out", "--seeds", "0-1", "--steps", "2")[0] == 0
    )
    assert sorted(path.name for path in Path("out").iterdir()) == ["000000.png", "000001.png"]
    from sign_fast.distill.networks import load_teacher

    net, cls, kwargs = load_teacher("edm-tiny.pkl", torch.device("cpu"))
    assert cls == "EDMPrecond" and kwargs == TINY
    _equal(net, tiny())


def test_every_load_of_torchs_is_of_weights_only():
    """No torch.load without weights_only=True, and no unpickler, in the library, its kernels and its benchmarks."""
    package = Path(sign_fast.__file__).resolve().parent
    found = 0
    for folder in (package, package / "kernels", package.parent / "benchmarks"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    assert not {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"} & set(names), path
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = node.func.value
                if node.func.attr == "load" and isinstance(owner, ast.Name) and owner.id == "torch":
                    found += 1
                    safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                    assert safe and isinstance(safe[0], ast.Constant) and safe[0].value is True, f"{path}:{node.lineno}"
                if node.func.attr == "load" and isinstance(owner, ast.Name) and owner.id in ("np", "numpy"):
                    allowed = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                    assert all(isinstance(v, ast.Constant) and v.value is False for v in allowed), (
                        f"{path}:{node.lineno}"
                    )
    assert found  # the training state

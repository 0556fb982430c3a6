"""Networks on the Hub: its layout, its calls and its errors, with a stand-in for the Hub itself."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from sign_fast import ImageGenerator, models
from sign_fast.checkpoints import hub
from sign_fast.checkpoints.card import record
from sign_fast.errors import SignFastError
from sign_fast.models import EDMPrecond, IdempotentPrecond, Precond, VPPrecond
from sign_fast.models.presets import CLASSES
from tests.checkpoints.snapshots import TINY, tiny, tiny_snapshot

STUDENT = {"role": "student", "sampling": {"steps": 2, "sigma": 2.0}}


def _equal(got: Precond, want: Precond) -> None:
    assert type(got) is type(want)
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


class StandInHub:
    """Repositories as folders; what was asked of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []
        self.error: Exception | None = None

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options))
        if self.error is not None:
            raise self.error
        cache = self.root / "cache" / repo_id.replace("/", "--")
        cache.mkdir(parents=True, exist_ok=True)
        for path in (self.root / repo_id).iterdir():
            if path.name in options["allow_patterns"]:
                shutil.copy(path, cache)
        return str(cache)

    def api(self, token: str | None = None) -> Any:
        stand_in = self

        class Api:
            def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
                if stand_in.error is not None:
                    raise stand_in.error
                full = repo_id if "/" in repo_id else f"me/{repo_id}"
                stand_in.asked.append((full, {"private": private, "token": token}))
                return type("Repo", (), {"repo_id": full})

            def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
                stand_in.asked.append((repo_id, options))
                shutil.copytree(folder_path, stand_in.root / repo_id)
                return f"https://huggingface.co/{repo_id}/commit/1"

        return Api()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    stand_in = StandInHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", stand_in.api)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_and_loaded(cls, tmp_path):
    torch.manual_seed(0)
    net = CLASSES[cls](
        8, 1, label_dim=2, **{k: v for k, v in TINY.items() if k not in ("img_resolution", "img_channels", "label_dim")}
    )
    net.save_pretrained(tmp_path / "net", config=STUDENT)
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "net" / "config.json").read_text(), parse_constant=pytest.fail)  # no Infinity
    assert config["cls"] == cls and config["role"] == "student"
    for loaded in (type(net).from_pretrained(tmp_path / "net", device="cpu"), models.load(tmp_path / "net", "cpu")):
        _equal(loaded, net)
        assert loaded.facts == STUDENT and not loaded.training
        assert (loaded.sigma_min, loaded.sigma_max) == (net.sigma_min, net.sigma_max)
    again = Precond.from_pretrained(tmp_path / "net", device="cpu")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "net" / "config.json").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "net/model.safetensors").read_bytes()


def test_what_is_saved_of_the_arguments(tmp_path):
    net = tiny(dtype=torch.bfloat16, sigma_data=0.5, resample_filter=(1, 3, 3, 1), sigma_max=float("inf"))
    net.use_fp16, net.sigma_min = True, 0.002
    assert net.init_kwargs() == {
        **{k: v for k, v in TINY.items() if k != "label_dim"},
        "resample_filter": [1, 3, 3, 1],
        "use_fp16": True,
        "sigma_min": 0.002,
    }
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.init_kwargs() == net.init_kwargs()
        _equal(other, net)


def test_a_student_of_a_teacher_is_saved(tmp_path):
    for cls in ("EDMPrecond", "iDDPMPrecond"):
        student = IdempotentPrecond.from_teacher(CLASSES[cls](**TINY), 40.0)
        student.save_pretrained(tmp_path / cls)
        loaded = models.load(tmp_path / cls, "cpu")
        _equal(loaded, student)
        u = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(loaded(u), student.eval()(u), atol=1e-5)


def test_signatures_stay_the_published_ones():
    assert next(iter(inspect.signature(EDMPrecond).parameters)) == "img_resolution"


def test_card(tmp_path):
    tiny().save_pretrained(tmp_path / "net", config=STUDENT)
    card = huggingface_hub.ModelCard.load(tmp_path / "net" / "README.md")
    assert card.data.library_name == "sign_fast" and card.data.pipeline_tag == "unconditional-image-generation"
    assert "sign_fast" in card.data.tags and "few-step" in card.data.tags and card.data.license is None
    assert card.text.strip().startswith("# net")
    code = card.text.split("```python\n")[1].split("```")[0].replace('"…"', repr(str(tmp_path / "net")))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (16, 8, 8, 1)
    record(tmp_path / "net", quality={"Fréchet distance": 3.5})
    again = huggingface_hub.ModelCard.load(tmp_path / "net" / "README.md")
    assert again.data.to_dict() == card.data.to_dict() and "3.5" in again.text


def test_pushed_and_loaded(stand_in):
    net = tiny()
    address = net.push_to_hub("me/digits", config=STUDENT, private=True, token="t", commit_message="first", branch="b")
    assert address == "https://huggingface.co/me/digits/commit/1"
    assert stand_in.asked[0] == ("me/digits", {"private": True, "token": "t"})
    assert stand_in.asked[1][1]["commit_message"] == "first" and stand_in.asked[1][1]["revision"] == "b"
    held = stand_in.root / "me/digits"
    assert sorted(p.name for p in held.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (held / "evil.py").write_text("raise SystemExit")
    for loaded in (models.load("me/digits", "cpu"), EDMPrecond.from_pretrained("me/digits", device="cpu")):
        _equal(loaded, net)
    generator = ImageGenerator.from_pretrained("me/digits", "cpu")
    assert generator.role == "student" and generator.default_steps == 2
    assert {tuple(options["allow_patterns"]) for _, options in stand_in.asked[2:]} == {tuple(hub.FILES)}
    assert len(stand_in.asked) == 5  # one request a load
    net.save_pretrained("mine", push_to_hub=True)
    assert stand_in.asked[-1][0] == "me/mine"


def test_options_of_a_download(stand_in):
    tiny().push_to_hub("me/net")
    options = {"revision": "v1", "cache_dir": "x", "force_download": True, "local_files_only": True, "token": "t"}
    EDMPrecond.from_pretrained("me/net", device="cpu", **options)
    assert stand_in.asked[-1] == ("me/net", {**options, "allow_patterns": hub.FILES})
    with pytest.raises(SignFastError, match=r"is a network of class EDMPrecond, not VPPrecond: say EDMPrecond\."):
        VPPrecond.from_pretrained("me/net", device="cpu")
    with pytest.raises(TypeError, match="map_location"):
        EDMPrecond.from_pretrained("me/net", map_location="cpu")


def test_folders_and_bundled_names_go_first(stand_in):
    tiny(1).save_pretrained("me/net")
    _equal(models.load("me/net", "cpu"), tiny(1))
    _equal(EDMPrecond.from_pretrained("me/net", device="cpu", revision="main"), tiny(1))
    assert models.load("digits-uncond", "cpu").img_resolution == 8
    for name in ("me/mistyped", "nowhere", "/a/b", "../x", "a/b/c", "./a", "a--b/c", "a/..", "C:\\x", "x" * 99 + "/y"):
        with pytest.raises(SignFastError, match="no network"):
            models.load(name, "cpu")
    assert stand_in.asked == []  # nobody is told the names of folders here


def _response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def _transport() -> Exception:
    """What the library under huggingface_hub raises, which is another in each of its versions."""
    base = next(cls for cls in errors.HfHubHTTPError.__mro__ if not cls.__module__.startswith("huggingface_hub"))
    library = importlib.import_module(base.__module__.partition(".")[0])
    kind = getattr(library, "ConnectError", None) or library.ConnectionError
    error: Exception = kind("no route")
    return error


_ERRORS = {
    "gated": (lambda: errors.GatedRepoError("x", response=_response(403)), "it is gated: ask for access at https"),
    "not found": (lambda: errors.RepositoryNotFoundError("x", response=_response(404)), "there is none of that name"),
    "revision": (lambda: errors.RevisionNotFoundError("x", response=_response(404)), "no such revision"),
    "offline by choice": (lambda: errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
    "offline": (lambda: errors.LocalEntryNotFoundError("x"), "the Hub cannot be reached: go online once"),
    "no permission": (lambda: errors.HfHubHTTPError("x", response=_response(403)), "no permission: hf auth login"),
    "server": (lambda: errors.HfHubHTTPError("busy\nlater", response=_response(503)), "busy$"),
    "transport": (_transport, "no route"),
    "disk": (lambda: OSError(28, "No space left on device"), "No space left"),
    "name": (lambda: errors.HFValidationError("x"), "a name is USER/NAME"),
}


@pytest.mark.parametrize("name", list(_ERRORS))
def test_errors_in_one_line(name, stand_in):
    make, line = _ERRORS[name]
    stand_in.error = make()
    with pytest.raises(SignFastError, match=line) as caught:
        models.load("me/net", "cpu")
    assert str(caught.value).startswith("cannot fetch me/net from the Hub: ") and "\n" not in str(caught.value)
    with pytest.raises(SignFastError, match=line) as caught:
        tiny().push_to_hub("me/net")
    assert str(caught.value).startswith("cannot put me/net on the Hub: ")


def test_other_errors_are_not_hidden(stand_in):
    stand_in.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        models.load("me/net", "cpu")


def test_repositories_of_other_things(stand_in):
    folder = stand_in.root / "me" / "other"
    folder.mkdir(parents=True)
    (folder / "x.pkl").write_bytes(tiny_snapshot())
    with pytest.raises(SignFastError, match=r"me/other on the Hub holds no config\.json: .* fetch a published \.pkl"):
        models.load("me/other", "cpu")
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SignFastError, match="is not a network of this library"):
        models.load("me/other", "cpu")


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: models.load("me/net", "cpu"), lambda: tiny().push_to_hub("me/net")):
        with pytest.raises(SignFastError, match=r"pip install 'sign-fast\[hub\]'"):
            act()
    tiny().save_pretrained(tmp_path / "net")  # folders need nothing
    _equal(EDMPrecond.from_pretrained(tmp_path / "net", device="cpu"), tiny())


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys; from sign_fast import models, ImageGenerator; from sign_fast.checkpoints import hub, store;"
        "store.find('digits-uncond'); print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_saving_over_what_is_there(tmp_path):
    folder = tmp_path / "net"
    tiny(1).save_pretrained(folder)
    tiny(2).save_pretrained(folder)
    _equal(models.load(folder, "cpu"), tiny(2))
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(SignFastError, match=r"holds thesis\.tex: name an empty folder, a new one or a network's"):
        tiny(3).save_pretrained(folder)
    _equal(models.load(folder, "cpu"), tiny(2))
    (tmp_path / "file").write_text("x")
    with pytest.raises(SignFastError, match="is a file: name a folder"):
        tiny().save_pretrained(tmp_path / "file")
    with pytest.raises(SignFastError, match=r"cls of config\.json are the network's own"):
        tiny().save_pretrained(tmp_path / "other", config={"cls": "x"})
    with pytest.raises(SignFastError, match=r"config\.json cannot hold"):
        tiny().save_pretrained(tmp_path / "other", config={"role": object()})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("config", [{"role": "king"}, {"sampling": {"steps": 0}}, {"trained": "yes"}, {"source": [1]}])
def test_nothing_is_saved_that_cannot_be_loaded(config, tmp_path):
    with pytest.raises(SignFastError, match=r"^config: "):
        tiny().save_pretrained(tmp_path / "net", config=config)
    assert not (tmp_path / "net").exists()


def test_a_bundled_name_is_one_with_options_of_the_hub_too(stand_in):
    assert EDMPrecond.from_pretrained("digits-uncond", device="cpu", revision="main").img_resolution == 8
    assert not stand_in.asked

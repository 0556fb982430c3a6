"""Folders of images with captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sign_fast.data.image_text import ImageTextFolder
from sign_fast.errors import SignFastError


def picture(path, width=8, height=8, mode="RGB", value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), value if mode == "L" else (value,) * len(mode)).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.png"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f" caption of\n{name} ")
    return tmp_path


def test_captions_beside_the_images(folder):
    data = ImageTextFolder(folder)
    assert data.names == ["a.jpg", "b.png", "sub/c.png"] and len(data) == 3
    assert data.captions == [f"caption of {name}" for name in data.names]
    assert [name for name, _ in data.fingerprint()] == data.names


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_captions_of_a_table(folder, ending, column):
    rows = [("./sub/c.png", "three"), ("a.jpg", "one"), ("b.png", 'two, "quoted"')]
    if ending == "jsonl":
        lines = [json.dumps({"file_name": name, column: text, "other": 3}) for name, text in rows]
    else:
        lines = [f"file_name,{column}", *(f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in rows)]
    (folder / f"metadata.{ending}").write_text("\n".join(lines) + "\n")
    assert ImageTextFolder(folder).captions == ["one", 'two, "quoted"', "three"]


def test_images_are_scaled_and_their_middle_is_cut_out(tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    picture(tmp_path / "grey.png", 20, 30, "L", 50)
    picture(tmp_path / "clear.png", 8, 8, "RGBA", 60)
    for name in ("wide", "grey", "clear"):
        (tmp_path / f"{name}.txt").write_text(name)
    data = ImageTextFolder(tmp_path)
    clear, grey, wide = (data.image(i, 16) for i in range(3))
    assert clear.shape == grey.shape == wide.shape == (3, 16, 16)
    assert (grey == 50).all() and (clear == 60).all() and (wide[:, :, 4:-4] == 200).all()


def test_a_narrow_strip_is_cut_before_it_is_scaled(tmp_path, monkeypatch):
    """The other way 2 × 3,000 pixels would become 64 × 96,000."""
    picture(tmp_path / "strip.png", 2, 3000)
    (tmp_path / "strip.txt").write_text("a strip")
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda im, size, *rest: sizes.append(size) or resize(im, size, *rest))
    assert (ImageTextFolder(tmp_path).image(0, 64) == 100).all() and sizes == [(64, 64)]


def jsonl(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "b.txt").unlink(), r"b.png has no caption \(1 of 3 images lack one\)"),
        (lambda f: (f / "b.txt").write_text(" \n"), "b.png: the caption is blank"),
        (lambda f: (f / "b.txt").write_bytes(b"\xff"), "b.txt is not readable as UTF-8"),
        (lambda f: jsonl(f, {"file_name": "a.jpg", "text": "x"}), r"has no row for b.png \(2 of 3 images"),
        (lambda f: jsonl(f, {"file_name": "../secret.png", "text": "x"}), "outside of the folder: remove it"),
        (lambda f: jsonl(f, {"file_name": "/etc/passwd", "text": "x"}), "outside of the folder: remove it"),
        (lambda f: jsonl(f, {"file_name": "d.png", "text": "x"}), "no image of the folder: remove it"),
        (lambda f: jsonl(f, {"file_name": "a.jpg"}), "row 1 must have file_name and a text"),
        (lambda f: jsonl(f, [1]), "row 1 must have file_name and a text"),
        (lambda f: jsonl(f, "{"), "metadata.jsonl cannot be read"),
        (lambda f: jsonl(f, "[" * 100_000), "metadata.jsonl cannot be read"),
        (lambda f: (jsonl(f), (f / "metadata.csv").write_text("x")), "keep one of them"),
        (lambda f: (f / "metadata.csv").write_text("name,text\na.jpg,x\n"), "row 1 must have file_name"),
    ],
    ids=[
        "lacks",
        "blank",
        "latin",
        "row",
        "outside",
        "absolute",
        "unknown",
        "text",
        "list",
        "json",
        "deep",
        "both",
        "csv",
    ],
)
def test_bad_folders(folder, change, message):
    change(folder)
    with pytest.raises(SignFastError, match=message) as caught:
        ImageTextFolder(folder)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_image(tmp_path):
    with pytest.raises(SignFastError, match="is not there: name a folder of images with captions"):
        ImageTextFolder(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SignFastError, match="holds no image"):
        ImageTextFolder(tmp_path)


def test_a_damaged_image_is_named(folder):
    (folder / "b.png").write_bytes(b"no image")
    data = ImageTextFolder(folder)
    with pytest.raises(SignFastError, match=r"b.png is not a readable image .* mend or remove it"):
        data.image(1, 8)

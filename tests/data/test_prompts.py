"""Prompts from text and Parquet files, and all that can be wrong with them."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from sign_fast.data.prompts import read_prompts
from sign_fast.errors import SignFastError


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\r\n  a dog  ", ["a cat", "a dog"]),
        ("über\u2028Katzen\x0bund\nHunde".encode(), ["über\u2028Katzen\x0bund", "Hunde"]),
    ],
    ids=["plain", "windows", "separators"],
)
def test_lines(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt: write one a line"),
        (b"\n", "holds no prompt"),
        (b"a cat\n\na dog\n \n", r"line 2 \(and 1 more\) is blank"),
        (b"a cat\na \xff dog\n", r"is not UTF-8 text \(line 2\): save it as UTF-8"),
    ],
    ids=["empty", "newline", "blank", "latin"],
)
def test_bad_lines(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(SignFastError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_no_file(tmp_path):
    with pytest.raises(SignFastError, match="is not there: name a file of prompts"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(SignFastError, match="is a folder"):
        read_prompts(tmp_path)


def table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["prompt", "text", "caption"])
def test_the_usual_columns_are_found(tmp_path, name):
    path = table(tmp_path / "p.parquet", id=[1, 2], **{name: ["a cat", "a dog"]})
    assert read_prompts(path) == ["a cat", "a dog"]


def test_a_column_by_name(tmp_path):
    path = table(tmp_path / "p.parquet", prompt=["a", "b"], words=pyarrow.array(["c", "d"], pyarrow.large_string()))
    assert read_prompts(path, "words") == ["c", "d"] and read_prompts(path) == ["a", "b"]
    path = table(tmp_path / "views.parquet", prompt=pyarrow.array(["e"], pyarrow.string_view()))
    assert read_prompts(path) == ["e"]


def test_several_columns_of_one_name(tmp_path):
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "prompt", "text"]), path)
    with pytest.raises(SignFastError, match="has several columns 'prompt': rename or remove all but one"):
        read_prompts(path)
    assert read_prompts(path, "text") == ["c"]


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        ({"id": [1], "words": ["a"]}, None, "no column 'prompt' or 'text' or 'caption': its columns are 'id', 'words'"),
        ({"prompt": ["a"]}, "words", "no column 'words': its columns are 'prompt'; name one with --prompt-column"),
        ({"prompt": [1]}, None, "column 'prompt' is int64, not text"),
        ({"prompt": ["a", None, " "]}, None, r"row 2 \(and 1 more\) is blank"),
        ({"prompt": pyarrow.array([], pyarrow.string())}, None, "holds no prompt: write one a row"),
    ],
    ids=["none", "other", "number", "null", "empty"],
)
def test_bad_tables(tmp_path, columns, column, message):
    path = table(tmp_path / "p.parquet", **columns)
    with pytest.raises(SignFastError, match=message):
        read_prompts(path, column)


def test_a_table_that_is_none_or_cut(tmp_path):
    whole = table(tmp_path / "p.parquet", prompt=["a"] * 1000).read_bytes()
    for content in (b"", b"a cat\n", whole[:-20], whole[20:]):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(SignFastError, match="is not a whole Parquet file") as caught:
            read_prompts(tmp_path / "bad.parquet")
        assert "\n" not in str(caught.value)

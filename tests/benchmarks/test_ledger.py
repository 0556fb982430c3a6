"""The ledger is only ever appended to, whoever writes, and grows by columns."""

from __future__ import annotations

import csv
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ledger import COLUMNS, append, read, without_folder
from sign_fast.errors import SignFastError

ROOT = Path(__file__).parents[2]


def test_an_older_file_gets_the_new_columns_and_keeps_its_rows(tmp_path):
    path = tmp_path / "ledger.csv"
    old = COLUMNS[: COLUMNS.index("mode")]
    append(path, [{"preset": "a", "command": 'x, "y"'}, {"preset": "b"}], old)
    append(path, [{"preset": "c", "mode": "latency", "ms_p99": 1.5}])
    append(path, [{"preset": "d"}])
    rows = read(path)
    assert list(rows[0]) == COLUMNS and all(set(row) == set(COLUMNS) for row in rows)
    assert [row["preset"] for row in rows] == list("abcd")
    assert [row["mode"] for row in rows] == ["", "", "latency", ""]
    assert rows[0]["command"] == 'x, "y"' and rows[2]["ms_p99"] == "1.5"
    assert not [file for file in tmp_path.iterdir() if file != path]


@pytest.mark.parametrize("header", [["other"], [*COLUMNS, "more"], COLUMNS[1:]])
def test_other_columns_are_refused(header, tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_text(",".join(header) + "\n")
    with pytest.raises(SignFastError, match="other columns"):
        append(path, [{"preset": "a"}])
    assert path.read_text() == ",".join(header) + "\n"


def _write(path: Path, name: str) -> None:
    for i in range(20):
        append(path, [{"preset": f"{name}{i}"}])


def test_writers_at_the_same_time_lose_no_row(tmp_path):
    path = tmp_path / "ledger.csv"
    append(path, [{"preset": "first"}], COLUMNS[:-3])  # is replaced by the first that appends
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    names = [row["preset"] for row in csv.DictReader(path.open())]
    assert sorted(names) == sorted(["first", *(f"{name}{i}" for name in "ab" for i in range(20))])


def test_reports_made_elsewhere_are_appended(tmp_path):
    report = {"rows": [{"date": "d", "provider": "plain", "batch": 1, "unknown": 3}, {"provider": "x", "skipped": "y"}]}
    file, ledger = tmp_path / "sweep.json", tmp_path / "ledger.csv"
    file.write_text(json.dumps(report))
    command = [sys.executable, "benchmarks/ledger.py", "--ledger", ledger, file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(row["date"], row["provider"], row["batch"]) for row in read(ledger)] == [("d", "plain", "1")]
    for text in ("{}", "[]", "no json", '{"rows": [{}]}'):
        file.write_text(text)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "not a report" in done.stderr and "Traceback" not in done.stderr
    assert len(read(ledger)) == 1


def test_commands_name_no_folder_of_this_machine():
    words = ["--outdir", f"{ROOT}/out/a", "/elsewhere/b", f"--data={ROOT}/c.zip", "--data=/elsewhere/d.zip", "1/2"]
    found = ["--outdir", "out/a", "b", "--data=c.zip", "--data=d.zip", "1/2"]
    assert [without_folder(word) for word in words] == found

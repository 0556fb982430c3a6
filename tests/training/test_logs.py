"""The logs of a run: two tables with columns of their own, cut back on resume, and TensorBoard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from sign_fast.errors import SignFastError
from sign_fast.training.logs import CsvTable, RunLog

TABLES = {"metrics": ["iteration", "loss", "lr"], "quality": ["iteration", "quality"]}


def fill(log, first, last, offset=0.0):
    for i in range(first, last + 1):
        log.write(i, {"loss": torch.tensor(i / 8 + offset), "lr": 0.25})
        if i % 3 == 0:
            log.write(i, {"quality": i + offset}, "quality")
            log.write_image("samples", i, np.full((4, 6, 1), i, np.uint8))
    log.close()


def test_two_tables_are_cut_back_on_resume(tmp_path):
    fill(RunLog(tmp_path, TABLES, 0), 1, 7)
    log = RunLog(tmp_path, TABLES, 4)
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "iteration,loss,lr", "1,0.125,0.25", "2,0.25,0.25", "3,0.375,0.25", "4,0.5,0.25"
    ]  # fmt: skip
    assert (tmp_path / "quality.csv").read_text().split() == ["iteration,quality", "3,3"]
    fill(log, 5, 6, 0.5)
    assert (tmp_path / "metrics.csv").read_text().split()[-2:] == ["5,1.125,0.25", "6,1.25,0.25"]
    assert (tmp_path / "quality.csv").read_text().split() == ["iteration,quality", "3,3", "6,6.5"]


def test_tensorboard_has_scalars_of_both_tables_and_images(tmp_path):
    fill(RunLog(tmp_path, TABLES, 0), 1, 7)
    board = EventAccumulator(str(tmp_path / "tensorboard"), {SCALARS: 0, IMAGES: 0}).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(i, i / 8) for i in range(1, 8)]
    assert [(e.step, e.value) for e in board.Scalars("quality")] == [(3, 3), (6, 6)]
    assert [(e.step, e.width, e.height) for e in board.Images("samples")] == [(3, 6, 4), (6, 6, 4)]


def test_a_resumed_run_replaces_what_tensorboard_had(tmp_path):
    fill(RunLog(tmp_path, TABLES, 0), 1, 7)
    fill(RunLog(tmp_path, TABLES, 4), 5, 6, 0.5)
    board = EventAccumulator(str(tmp_path / "tensorboard"), {SCALARS: 0}).Reload()
    assert [(e.step, e.value) for e in board.Scalars("quality")] == [(3, 3), (6, 6.5)]


@pytest.mark.parametrize("cut", ["5", "5,", "5,0.5", "x,0.5,0.25", "5,0.5,0.25,9", "", ",,"])
def test_a_row_that_a_kill_has_cut_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    path.write_text(f"iteration,loss,lr\n4,0.5,0.25\n{cut}")
    CsvTable(path, TABLES["metrics"], 9)
    assert path.read_text().split() == ["iteration,loss,lr", "4,0.5,0.25"]


def test_columns_may_change_between_runs(tmp_path):
    path = tmp_path / "quality.csv"
    path.write_text("iteration,old,quality\n100,1,5.5\n")
    CsvTable(path, ["iteration", "quality", "new"], 100).write(200, {"quality": 4.5, "new": 2})
    assert path.read_text().split() == ["iteration,quality,new", "100,5.5,", "200,4.5,2"]


def test_a_table_that_cannot_be_read(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(SignFastError, match=r"cannot read .*metrics\.csv \(.*: move it away") as told:
        RunLog(tmp_path, TABLES, 0)
    assert "\n" not in str(told.value)
    (tmp_path / "quality.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SignFastError, match=r"cannot read .*quality\.csv"):
        CsvTable(tmp_path / "quality.csv", TABLES["quality"], 0)


def test_a_missing_value_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="lr"):
        RunLog(tmp_path, TABLES, 0).write(1, {"loss": 1.0})

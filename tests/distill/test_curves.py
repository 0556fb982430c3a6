"""curves.png: which panels there are, and what the pixels show."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from sign_fast.distill.curves import draw_curves, panels, read_table, running_mean
from sign_fast.distill.quality import IDEMPOTENCE_COLUMNS, score_gap_columns
from sign_fast.errors import SignFastError
from sign_fast.sampling.pictures import read_png

BLUE, RED = (0x2B, 0x7D, 0xE9), (0xD9, 0x30, 0x25)


def write(folder, name, columns):
    with (folder / f"{name}.csv").open("w") as file:
        print(*columns, sep=",", file=file)
        for row in zip(*columns.values(), strict=True):
            print(*row, sep=",", file=file)


def pixels(folder, colour, share=0.5):
    """Rows and columns of the pixels that are a colour on white, at least `share` of it: lines have soft edges."""
    depth = 255.0 - read_png(folder / "curves.png")[..., :3]
    full = 255.0 - np.array(colour)
    found = depth @ full / (full @ full)
    return np.nonzero((found >= share) & (np.abs(depth - found[..., None] * full) <= 12).all(-1))


ITERATIONS = [100 * i for i in range(1, 61)]
DECAY = [1000 * 0.9**i for i in range(60)]


def test_a_decay_is_a_straight_line_on_the_logarithmic_axis(tmp_path):
    write(tmp_path, "quality", {"iteration": ITERATIONS, "score_gap_1": DECAY})
    assert draw_curves(tmp_path) == ""
    rows, columns = pixels(tmp_path, (68, 1, 84))  # viridis begins here
    inside = columns < columns.min() + 400  # the legend is on the right
    rows, columns = rows[inside], columns[inside]
    slope, start = np.polyfit(columns, rows, 1)
    assert slope > 0.3  # rows count downwards: it falls
    assert np.abs(rows - (start + slope * columns)).max() < 4


def test_the_best_quality_is_marked(tmp_path):
    values = [100.0] * 60
    values[29] = 60.0
    write(tmp_path, "quality", {"iteration": ITERATIONS, "quality": values})
    draw_curves(tmp_path)
    rows, columns = pixels(tmp_path, BLUE)
    lowest = columns[rows > rows.max() - 6]  # the star hangs at the dip
    left, right = columns.min(), columns[rows < rows.min() + 60].max()
    assert np.ptp(lowest) <= 16 and abs(lowest.mean() - (left + (right - left) * 29 / 59)) < 15
    assert len(rows[(rows > rows.max() - 14)]) > 50  # an area, not a line's tip


def test_goals_and_the_limit_are_drawn(tmp_path):
    write(tmp_path, "quality", {"iteration": ITERATIONS, "quality": DECAY})
    draw_curves(tmp_path)
    assert len(pixels(tmp_path, RED)[0]) == 0
    plain_row_lengths = np.bincount(pixels(tmp_path, BLUE)[0])
    draw_curves(tmp_path, {"quality": 6.0}, stop_above=30.0)
    rows, columns = pixels(tmp_path, RED)
    stop_row = np.bincount(rows).argmax()
    assert np.ptp(columns[rows == stop_row]) > 400  # from left to right
    lengths = np.bincount(pixels(tmp_path, BLUE)[0])
    goal_row = lengths.argmax()
    assert lengths[goal_row] > 250 > plain_row_lengths.max()  # a dashed line, where there was none
    assert goal_row > stop_row  # 6 is below 30


def test_a_goal_of_two_lines_is_drawn_once_and_grey(tmp_path):
    values = {name: [0.2 - 0.003 * i for i in range(60)] for name in IDEMPOTENCE_COLUMNS}
    write(tmp_path, "quality", {"iteration": ITERATIONS, **values})
    draw_curves(tmp_path)
    before = read_png(tmp_path / "curves.png")
    draw_curves(tmp_path, {"idempotence_noise": 0.05, "reconstruction": 0.05})
    after = read_png(tmp_path / "curves.png")
    lengths = (before != after).any(-1).sum(1)
    lines = np.nonzero(lengths > 250)[0]
    assert 1 <= len(lines) <= 3 and np.ptp(lines) == len(lines) - 1  # one line, its edges soft
    row = after[lengths.argmax()].astype(int)
    changed = (before[lengths.argmax()] != row).any(-1)
    assert (np.ptp(row[changed][:, :3], 1) <= 12).mean() > 0.95  # without a colour


def test_panels_of_sid_and_of_sign(tmp_path):
    signed = [(-1) ** i * 0.5 for i in range(60)]
    metrics = {"iteration": ITERATIONS, "kimg": ITERATIONS, "loss_student": signed, "loss_fake": DECAY}
    write(tmp_path, "metrics", {**metrics, "grad_norm_student": DECAY, "grad_norm_fake": DECAY, "lr": DECAY})
    write(
        tmp_path,
        "quality",
        {"iteration": ITERATIONS, "quality_1": DECAY, "quality_4": DECAY, **dict.fromkeys(score_gap_columns(), DECAY)},
    )
    sid = panels(read_table(tmp_path / "metrics.csv"), read_table(tmp_path / "quality.csv"))
    assert [(panel.title.split(",")[0], [line.label for line in panel.lines]) for panel in sid] == [
        ("Quality of the EMA (lower is better)", ["1 step", "4 steps"]),
        ("Score gap", ["σ = 0.1", "σ = 0.3", "σ = 1", "σ = 3", "σ = 10"]),
        ("Losses", ["fake"]),
        ("Losses that change sign (no measure of quality)", ["student"]),
        ("Gradient norms", ["student", "fake"]),
    ]
    draw_curves(tmp_path)
    height, width, _ = read_png(tmp_path / "curves.png").shape
    assert width > 1000 and height > 900  # two columns, three rows
    write(tmp_path, "quality", {"iteration": ITERATIONS, "quality": DECAY, **dict.fromkeys(IDEMPOTENCE_COLUMNS, DECAY)})
    write(
        tmp_path,
        "metrics",
        {"iteration": ITERATIONS, "rec": DECAY, "idem": [0.0, *DECAY[1:]], "lr": DECAY, "loss_fake": DECAY},
    )
    sign = panels(read_table(tmp_path / "metrics.csv"), read_table(tmp_path / "quality.csv"))
    assert [[line.column for line in panel.lines] for panel in sign] == [
        ["quality"],
        IDEMPOTENCE_COLUMNS,
        ["rec", "idem", "loss_fake"],  # a term that is ramped up from 0 does not change sign
    ]


@pytest.mark.parametrize(
    "values", [[float("nan")] * 3, [0.0] * 3, [1.0, float("nan"), float("inf")], [-1.0, 0.0, 1e6], [0.0, 1.0, 1e6]]
)
@pytest.mark.filterwarnings("error")
def test_odd_values_are_drawn_or_left_out(tmp_path, values):
    write(tmp_path, "metrics", {"iteration": [1, 2, 3], "loss": values, "grad_norm": [1.0, 2.0, 3.0]})
    write(tmp_path, "quality", {"iteration": [1, 2, 3], "quality": values})
    assert draw_curves(tmp_path) == ""
    assert len(pixels(tmp_path, BLUE)[0]) > 100


def test_cut_rows_and_empty_tables(tmp_path):
    assert draw_curves(tmp_path) == "" and not (tmp_path / "curves.png").exists()
    (tmp_path / "metrics.csv").write_text("iteration,loss\n")
    (tmp_path / "quality.csv").write_text("")
    assert draw_curves(tmp_path) == "" and not (tmp_path / "curves.png").exists()
    (tmp_path / "metrics.csv").write_text("iteration,loss\n1,2.5\n2,\n3")
    table = read_table(tmp_path / "metrics.csv")
    assert table["iteration"].tolist() == [1, 2] and np.array_equal(table["loss"], [2.5, np.nan], equal_nan=True)


def test_running_mean():
    values = np.array([1.0, np.nan, 4.0, 7.0, np.nan, np.nan, np.nan])
    want = [np.nanmean(values[max(0, i - 1) : i + 2]) if i < 5 else np.nan for i in range(7)]
    assert np.array_equal(running_mean(values, 1), want, equal_nan=True)
    assert np.array_equal(running_mean(values, 0), values, equal_nan=True)


def test_without_matplotlib_there_is_a_note(tmp_path, monkeypatch):
    write(tmp_path, "quality", {"iteration": ITERATIONS, "quality": DECAY})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curves(tmp_path) == "curves.png is off: pip install 'sign-fast[train]'"
    assert not (tmp_path / "curves.png").exists()


def test_an_interrupted_drawing_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, "quality", {"iteration": ITERATIONS, "quality": DECAY})
    draw_curves(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(SignFastError, match=r"curves.png: the disk is full"):
        draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "quality.csv"]

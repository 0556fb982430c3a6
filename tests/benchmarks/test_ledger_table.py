"""The figures in README and docs are the ledger's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernels import LEDGER as KERNELS
from benchmarks.ledger import COLUMNS, DEFAULT, read
from benchmarks.ledger_table import PAGES, rewritten

ROOT = Path(__file__).parents[2]


def row(**changes):
    base = dict.fromkeys(COLUMNS, "1") | {"preset": "p", "provider": "plain", "date": "2026-01-01T00:00:00Z"}
    base["mode"] = "throughput"
    return {**base, **changes}


def test_every_table_is_current():
    marked = {path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if "<!-- ledger" in path.read_text()}
    assert marked == set(PAGES)
    assert "<!-- kernels" in "".join(path.read_text() for path in PAGES)
    for path in PAGES:
        text = path.read_text()
        assert rewritten(text, read(DEFAULT), read(KERNELS)) == text, path.name


def test_newest_row_of_each_provider_is_shown():
    new = {"date": "2026-02-01T00:00:00Z"}
    rows = [
        row(images_per_second="5"),
        row(provider="sign_fast", images_per_second="6"),  # of the older run: not beside the newer one's plain
        row(preset="q", images_per_second="9"),
        row(images_per_second="7.25", **new),
    ]
    text = rewritten("a\n<!-- ledger preset=p -->\nold\n<!-- /ledger -->\nb\n", rows)
    assert "| 7.2 |" in text
    assert not [old for old in ("old", "| 5.0 |", "| 6.0 |", "| 9.0 |") if old in text]
    assert text.startswith("a\n<!-- ledger preset=p -->\n| batch") and text.endswith("<!-- /ledger -->\nb\n")


def test_samplers_steps_and_threads_are_measurements_of_their_own():
    new = {"date": "2026-02-01T00:00:00Z"}
    rows = [
        row(sampler="few_step", images_per_second="5"),
        row(sampler="edm", steps="18", threads="2", images_per_second="6", **new),
        row(sampler="edm", steps="18", threads="1", images_per_second="7", **new),
        row(mode="latency", sampler="few_step", images_per_second="8", ms_p99="4.5", **new),
    ]

    def table(words):
        return rewritten(f"<!-- ledger {words} -->\n<!-- /ledger -->", rows)

    every = table("preset=p")
    assert "| sampler | steps | threads | batch | provider | images/s |" in every
    cells = [line.split(" | ")[:6] for line in every.splitlines() if "`plain` |" in line]
    assert cells == [
        ["| edm", "18", "1", "1", "`plain`", "7.0"],
        ["| edm", "18", "2", "1", "`plain`", "6.0"],
        ["| few_step", "1", "1", "1", "`plain`", "5.0"],
    ]
    heun = table("preset=p sampler=edm steps=18 threads=1")
    assert "| batch | provider |" in heun and "| 7.0 |" in heun and "| 6.0 |" not in heun
    assert "| 8.0 |" in table("mode=latency") and "| 4.5 |" in table("mode=latency")


def test_rows_from_before_there_were_modes_are_of_throughput():
    old = {key: value for key, value in row().items() if key not in COLUMNS[COLUMNS.index("mode") :]}
    text = rewritten("<!-- ledger preset=p -->\n<!-- /ledger -->", [old])
    assert "| 1 | `plain` | 1.0 |" in text and "roofline" not in text and "p99" not in text
    with pytest.raises(ValueError, match="no ledger row for mode=cold"):
        rewritten("<!-- ledger mode=cold -->\n<!-- /ledger -->", [old])


def test_cold_rows_have_no_rate():
    cold = dict.fromkeys(COLUMNS, "") | {"preset": "p", "provider": "plain", "batch": "1", "steps": "1"}
    cold |= {"threads": "1", "mode": "cold", "first_image_s": "1.26", "import_s": "1.1"}
    text = rewritten("<!-- ledger mode=cold -->\n<!-- /ledger -->", [cold])
    assert "images/s" not in text and "| 1.1 s | 1.3 s |" in text


def test_a_table_without_rows_is_an_error():
    with pytest.raises(ValueError, match="no ledger row for preset=zz"):
        rewritten("<!-- ledger preset=zz -->\n<!-- /ledger -->", [row()])


def test_unknown_columns_and_open_markers_are_errors():
    with pytest.raises(ValueError, match="no column colour"):
        rewritten("<!-- ledger colour=red -->\n<!-- /ledger -->", [row()])
    with pytest.raises(ValueError, match="has no <!-- /ledger -->"):
        rewritten("<!-- ledger preset=p -->\n", [row()])


def test_kernels_are_summed_up_over_the_newest_runs_shapes():
    def kernel(**changes):
        base = {
            "date": "2026-02-01", "command": "c", "device": "d", "threads": "2", "driver": "none", "torch": "t",
            "commit": "abc", "device_type": "cpu", "operation": "norm", "direction": "forward", "dtype": "float32",
            "batch": "16", "provider": "sign_fast", "ratio_to_eager": "2",
        }  # fmt: skip
        return {**base, **changes}

    rows = [
        kernel(date="2026-01-01", ratio_to_eager="99"),
        kernel(),
        kernel(ratio_to_eager="8"),
        kernel(provider="eager", ratio_to_eager="1"),
        kernel(device_type="cuda", ratio_to_eager="77"),
    ]
    text = rewritten("<!-- kernels device_type=cpu -->\n<!-- /kernels -->", [], rows)
    assert "| `norm` float32 | forward | 16 | 2 | 4.00× | 2.00× | 8.00× |" in text
    assert "99" not in text and "77" not in text
    with pytest.raises(ValueError, match="no ledger row for device_type=tpu"):
        rewritten("<!-- kernels device_type=tpu -->\n<!-- /kernels -->", [], rows)

"""README's figures are the ledger's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernels import LEDGER as KERNELS
from benchmarks.ledger import COLUMNS, DEFAULT, read
from benchmarks.ledger_table import rewritten

ROOT = Path(__file__).parents[2]


def row(**changes):
    base = dict.fromkeys(COLUMNS, "1") | {"preset": "p", "provider": "plain", "date": "2026-01-01T00:00:00Z"}
    return {**base, **changes}


def test_readme_is_current():
    text = (ROOT / "README.md").read_text()
    assert "<!-- ledger" in text
    assert "<!-- kernels" in text
    assert rewritten(text, read(DEFAULT), read(KERNELS)) == text


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

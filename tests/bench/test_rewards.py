"""The rewards benchmark: its rows."""

import statistics
import time

import pytest

from boxgrpo.bench.reward_bench.run import rows_of


def test_a_row_holds_all_warm_rounds_and_their_median():
    """Three turns of ten: the first turn warms up, and the first round of each other turn is a figure of its own."""
    (row,) = rows_of({"nap": lambda: time.sleep(1e-4)}, 3)
    assert row["rounds"] == len(row["samples_ms"]) == 18 and len(row["samples_first_ms"]) == 2
    assert row["ms"] == pytest.approx(statistics.median(row["samples_ms"]), abs=1e-4)
    assert row["spread_ms"] == [min(row["samples_ms"]), max(row["samples_ms"])]

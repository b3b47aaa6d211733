"""The rewards benchmark: its rows, and those recorded."""

import statistics
import time

import pytest

from boxgrpo.bench.records import find_row, newest
from boxgrpo.bench.reward_bench.run import rows_of


def test_what_was_recorded_is_timed_on_the_same_completions():
    """On one core at 128 completions of 256 tokens, the median of warm rounds; a rate is that of the bytes."""
    rows = newest()["rewards"]["rows"]
    for name in ("ids", "decode, re, IoU"):
        row = find_row(rows, run=name)
        assert (row["completions"], row["tokens"]) == (128, 256) and row["rounds"] >= 100
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]
    for name in ("bytes, think", "bytes, list"):
        row = find_row(rows, run=name)
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["ms"] / 1e6, abs=0.01) and row["bytes"] > 10**6


def test_a_row_holds_all_warm_rounds_and_their_median():
    """Three turns of ten: the first turn warms up, and the first round of each other turn is a figure of its own."""
    (row,) = rows_of({"nap": lambda: time.sleep(1e-4)}, 3)
    assert row["rounds"] == len(row["samples_ms"]) == 18 and len(row["samples_first_ms"]) == 2
    assert row["ms"] == pytest.approx(statistics.median(row["samples_ms"]), abs=1e-4)
    assert row["spread_ms"] == [min(row["samples_ms"]), max(row["samples_ms"])]

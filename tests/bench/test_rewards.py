"""The recorded rewards benchmark: its figures against the demands; and its rows."""

import statistics
import time

import pytest

from boxgrpo.bench.publish.result_files import newest, part
from boxgrpo.bench.reward_bench.rewards_table import rows_of, summary


@pytest.fixture(scope="module")
def result():
    return part(newest(), "rewards")


@pytest.fixture(scope="module")
def runs(result):
    return {row["run"]: row for row in result["rows"]}


def test_both_paths_are_timed_on_the_same_completions(runs):
    """On one core at 128 completions of 256 tokens, the median of warm rounds."""
    for name in ("ids", "decode, re, IoU"):
        row = runs[name]
        assert (row["completions"], row["tokens"]) == (128, 256) and row["rounds"] >= 100
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]


def test_the_rate_is_that_of_the_bytes(runs):
    for name in ("bytes, think", "bytes, list"):
        row = runs[name]
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["ms"] / 1e6, abs=0.01) and row["bytes"] > 10**6


def test_a_row_holds_all_warm_rounds_and_their_median():
    """Three turns of ten: the first turn warms up, and the first round of each other is told apart."""
    (row,) = rows_of({"nap": lambda: time.sleep(1e-4)}, 3, nap={"bytes": 7})
    assert row["rounds"] == len(row["samples_ms"]) == 18 and row["bytes"] == 7
    assert row["ms"] == pytest.approx(statistics.median(row["samples_ms"]), abs=1e-4)
    assert row["spread_ms"] == [min(row["samples_ms"]), max(row["samples_ms"])]


def test_the_summary_has_a_line_for_each_run(result):
    assert len(summary(result).splitlines()) == len(result["rows"]) + 1

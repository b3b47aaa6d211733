"""The recorded rewards benchmark: its figures against the demands, and the README's copy of them."""

import json

import pytest

from boxgrpo.bench.bench_rewards import summary, times_faster
from boxgrpo.bench.machine import RESULTS


@pytest.fixture(scope="module")
def result():
    return json.loads((RESULTS / "cpu/rewards.json").read_text())


@pytest.fixture(scope="module")
def runs(result):
    return {row["run"]: row for row in result["rows"]}


def test_ids_take_a_hundredth_of_decoding_searching_and_python(result, runs):
    """On one core at 128 completions of 256 tokens, the median of warm rounds."""
    for name in ("ids", "decode, re, IoU"):
        row = runs[name]
        assert (row["completions"], row["tokens"]) == (128, 256) and row["rounds"] >= 100
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]
    assert times_faster(result) >= 100


def test_bytes_are_read_at_a_gigabyte_a_second(runs):
    for name in ("bytes, think", "bytes, list"):
        row = runs[name]
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["ms"] / 1e6, abs=0.01) and row["bytes"] > 10**6
        assert row["gb_per_second"] >= 1


def test_the_readme_shows_the_recorded_figures(result, runs):
    readme = (RESULTS.parent.parent / "README.md").read_text()
    ours, theirs = (runs[name]["ms"] for name in ("ids", "decode, re, IoU"))
    assert f"| ms | {ours:.3f} | {theirs:.2f} |" in readme
    ours, theirs = (runs[name]["first_ms"] for name in ("ids", "decode, re, IoU"))
    assert f"straight after other work it is {ours:.2f} ms against {theirs:.2f} ms" in readme.replace("\n", " ")
    rate, worst = (runs[name]["gb_per_second"] for name in ("bytes, think", "bytes, tags and boxes only"))
    words = f"{rate:.1f} GB/s ({worst:.2f} where it is nothing but tags and boxes)"
    assert words in readme.replace("\n", " ")


def test_the_summary_has_a_line_for_each_run(result):
    assert len(summary(result).splitlines()) == len(result["rows"]) + 1

"""The demo's three seeds: the table says what the runs gave, and the README says what the table does."""

import json

from boxgrpo.bench.bench_demo import RESULTS, table


def run_of(seed, before, after, continued):
    return {
        "seed": seed,
        "stage_seconds": {"grpo": 100.4, "continued_sft": 99.6},
        "before": {"mean": before},
        "after": {"mean": after},
        "continued_sft": {"mean": continued},
        "details": {"before": {"well_formed_iou": 0.5}, "after": {"well_formed_iou": 0.625}},
    }


def test_the_table_has_a_row_a_seed_and_the_mean_lift():
    lines = table({"runs": [run_of(0, 0.4, 0.55, 0.41), run_of(1, 0.5, 0.575, 0.52)]}).splitlines()
    assert lines[2] == "| 0 | 40.0 | 55.0 | +15.0 | 0.500 → 0.625 | 41.0 | 100, 100 |"
    assert lines[3] == "| 1 | 50.0 | 57.5 | +7.5 | 0.500 → 0.625 | 52.0 | 100, 100 |"
    assert lines[4].startswith("| mean |") and "| +11.2 |" in lines[4]


def test_the_readme_shows_the_runs_that_were_recorded():
    recorded = json.loads((RESULTS / "cpu/demo.json").read_text())
    assert table(recorded) in (RESULTS.parent.parent / "README.md").read_text()
    assert recorded["machine"]["device"] in (RESULTS.parent.parent / "README.md").read_text()

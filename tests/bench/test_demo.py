"""The demo's three seeds: the table says what the runs gave, and they were a real lift."""

import json

from boxgrpo.bench.machine import RESULTS
from boxgrpo.bench.publish.tables import table


def recorded():
    return json.loads((RESULTS / "cpu/demo.json").read_text())


def test_the_table_says_what_the_runs_gave():
    run = {
        "seed": 7,
        "stage_seconds": {"cold_start": 200.4, "grpo": 100.4, "continued_sft": 99.6},
        "before": {"mean": 0.4},
        "after": {"mean": 0.55},
        "continued_sft": {"mean": 0.39},
        "habits": {
            stage: {"margin": share, "rest_accuracy_at_0.5": 0.625}
            for stage, share in (("before", 0.5), ("after", 0.0), ("continued_sft", 0.25))
        },
        "details": {stage: {"well_formed_iou": 0.5, "format": 1.0} for stage in ("before", "after", "continued_sft")},
    }
    assert table("demo", {"runs": [run]}).splitlines()[2:] == [
        "| 7 | Acc@0.5 | 40.0 | 55.0 (+15.0) | 39.0 (-1.0) |",
        "|  | IoU | 0.500 | 0.500 | 0.500 |",
        "|  | format | 1.000 | 1.000 | 1.000 |",
        "|  | answers with a margin | 50 % | 0 % | 25 % |",
        "|  | Acc@0.5 of the others | 62.5 | 62.5 | 62.5 |",
        "|  | seconds | 200 | 100 | 100 |",
    ]


def test_the_recorded_runs_are_a_real_cold_start_and_a_real_lift():
    runs = recorded()["runs"]
    lifts = [run["after"]["mean"] - run["before"]["mean"] for run in runs]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    assert min(lifts) >= 0.05 and sum(lifts) / len(lifts) >= 0.10
    for run in runs:
        before, after = (run["details"][stage] for stage in ("before", "after"))
        assert before["format"] >= 0.95 and run["before"]["mean"] >= 0.30
        assert after["well_formed_iou"] > before["well_formed_iou"]
        assert run["seconds"] < 600

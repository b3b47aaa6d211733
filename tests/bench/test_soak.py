"""The soak: what it compares with, what it calls flat, when it kills; and a short one of its own."""

import contextlib
import json
import random

import pytest

from boxgrpo.bench.soaks import kills as soak_kills
from boxgrpo.bench.soaks import soak
from boxgrpo.bench.soaks import verdicts as soak_verdicts
from boxgrpo.bench.soaks import worker as soak_worker

METRICS = [{"step": n, "loss": 0.5, "step_time": 0.1 * n, "timing_s/data": 0.01 * n} for n in (1, 2, 3)]


def write_run(path, metrics=METRICS, weights=b"abc", samples=b"1\n", position=48, metrics_bytes=7):
    for folder in ("checkpoint-3/trainer", "tensorboard"):
        (path / folder).mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / "model.safetensors").write_bytes(weights)
    (path / "samples.rank1").write_bytes(samples)
    progress = {"progress": {"position": position, "metrics_bytes": metrics_bytes}, "options": str(path)}
    (path / "checkpoint-3/trainer/progress.json").write_text(json.dumps(progress))
    (path / "checkpoint-3/trainer/rng-rank0.json").write_text(str(path))
    (path / "tensorboard/events").write_text(str(path))
    return path


LATER = [line | {"step_time": 9.0, "timing_s/data": 8.0, "perf/mfu": 7.0} for line in METRICS]


@pytest.mark.parametrize(
    "change, extra, found",
    [
        ({"metrics": LATER, "metrics_bytes": 9}, None, []),
        ({"weights": b"abd"}, None, ["model.safetensors"]),
        ({"samples": b"2\n"}, None, ["samples.rank1"]),
        ({"position": 64}, None, ["checkpoint-3/trainer/progress.json"]),
        ({"metrics": METRICS[:2]}, None, [f"metrics line 3: {key} is missing in one" for key in ("loss", "step")]),
        ({"metrics": [*METRICS[:2], METRICS[2] | {"loss": 0.5 + 1e-16 * 2}]}, None, ["metrics line 3: loss"]),
        ({"metrics": [*METRICS[:2], METRICS[2] | {"kl": 0.0}]}, None, ["metrics line 3: kl is missing in one"]),
        ({}, ".checkpoint-3.part/config.json", [".checkpoint-3.part/config.json is missing in one"]),
        ({}, "checkpoint-1/config.json", ["checkpoint-1/config.json is missing in one"]),
    ],
)
def test_runs_are_the_same_but_for_time_and_each_other_difference_is_found(tmp_path, change, extra, found):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", **change)
    if extra:
        (one / extra).parent.mkdir()
        (one / extra).write_text("")
    assert soak_verdicts.differences(one, other) == found


def test_a_step_that_is_lost_or_logged_twice_is_found():
    def lost(*steps):
        return soak_verdicts.lost_steps([{"step": n} for n in steps], 3)

    assert lost(1, 2, 3) == [] and lost(1, 3) == [2] and lost(1, 2, 3, 4) == [4] and lost() == [1, 2, 3]
    assert lost(1, 2, 2, 3) == [1, 2, 2, 3] and lost(2, 1, 3) == [2, 1, 3]


def test_growth_compares_the_last_100_steps_with_those_after_the_first_100():
    def growth(*last):
        sizes = [500e6] * 100 + [1000e6] * 100 + [5000e6] * 200  # a beginning and a bulge count for nothing
        return soak_verdicts.growth([*sizes, *last])

    assert growth(*[1000e6] * 100) == {"fifths_mb": [500, 1000, 5000, 5000, 1000], "peak_mb": 5000, "growth": 0}
    assert growth(*[1030e6] * 100)["growth"] == 0.03 and growth(*[970e6] * 100)["growth"] == -0.03
    leak = soak_verdicts.growth([1000e6 + 1e5 * n for n in range(500)])
    assert leak["growth"] > soak.FLAT, "100 KB a step is a leak"


def test_nan_steps_must_be_those_that_were_made_nan(tmp_path):
    path = write_run(tmp_path / "run")
    metrics = [line | {"skipped_steps": skipped, "data/skipped": 2} for line, skipped in zip(METRICS, (0, 1, 1))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for made_nan, met in ((2, True), (3, False), (None, False)):
        for rank in range(2):
            step_log = [{"step": n} | ({"nan": True} if n == made_nan and rank == 1 else {}) for n in (1, 2, 2, 3)]
            (path / f"step_log.rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in step_log))
        lost, skipped, corrupt = (d["met"] for d in soak_verdicts.faulty_demands(path, 3))
        assert lost and corrupt and skipped == met


def test_nan_comes_to_some_steps_and_any_rank_and_to_the_same_ones_again():
    drawn = [soak_worker.nan_rank(0, step, 2) for step in range(500)]
    assert drawn == [soak_worker.nan_rank(0, step, 2) for step in range(500)]
    assert drawn != [soak_worker.nan_rank(1, step, 2) for step in range(500)]
    assert 5 <= drawn.count(0) + drawn.count(1) <= 40 and drawn.count(0) and drawn.count(1)


@pytest.mark.parametrize("count, steps, every", [(30, 60, 3), (6, 500, 20), (2, 12, 3), (1, 100, 20)])
def test_kills_come_in_order_and_in_time(count, steps, every):
    kills = soak_kills.plan(random.Random(0), count, steps, every, {"start": 8.0, "step": 0.4, "save": 0.1})
    assert len(kills) == count and [k.step for k in kills] == sorted(k.step for k in kills)
    aims = [k.aim for k in kills]
    assert aims.count("saving") == count // 3 and aims.count("starting") == count // 10
    assert all(k.step <= steps - every for k in kills if k.aim != "end")
    saving = [k.step for k in kills if k.aim == "saving"]
    assert len(set(saving)) == len(saving) and all(step % every == 0 for step in saving)


@pytest.mark.slow
def test_a_short_soak(tmp_path, capsys):
    """Every demand but flat memory, which takes hundreds of steps, is met."""
    flags = ["--parts=A,C", "--kills=3", "--steps=12", "--seed=96", "--cold_start_steps=100", "--train=100"]
    result = tmp_path / "soak.json"
    with contextlib.suppress(SystemExit):
        soak.main([*flags, f"--output_dir={tmp_path / 'soak'}", f"--json={result}"])
    a, c = (json.loads(result.read_text())["parts"][part] for part in "AC")
    assert [k["struck"] for k in a["kills"]] == [True] * 3 and a["differences"] == []
    demands = [d for part in (a, c) for d in part["demands"] if not d["demand"].startswith("memory")]
    assert len(demands) == 8 and all(d["met"] for d in demands), demands
    assert all(figures["peak_mb"] > 100 for figures in c["memory"].values())
    assert "no step lost" in capsys.readouterr().out

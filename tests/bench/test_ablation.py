"""The ablation: its tables, which runs are repeated and which are not, and a short one from begin to end."""

import json

import pytest
from PIL import Image

from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.studies import ablation
from boxgrpo.bench.studies.ablation_rows import COLUMNS, METHODS, PAPER, spread
from boxgrpo.bench.studies.curves import binned, plot
from boxgrpo.trainer import demo
from boxgrpo.trainer.world.scenes import TASKS


def scores(mean, level=0.5):
    return dict.fromkeys(COLUMNS, mean) | {"mean": mean, "level 0": level, "level 1": 0.25, "format": 1.0}


def made_up(method, seed, mean, **more):
    return {"seed": seed, "method": method, "scores": scores(mean), **more}


def test_every_drawn_task_has_a_column_and_every_method_its_row_in_the_paper():
    assert set(COLUMNS) == set(TASKS) and list(METHODS) == ["base", *ablation.METHODS]
    twice = {"GRPO", "GRPO-Difficulty (10k)"}  # rows of Table 4 and of Table 5
    assert {row for *_, row in METHODS.values()} == PAPER.keys() - twice - {"CoT-SFT (21k)"}
    assert PAPER["GRPO"] == PAPER["GRPO (10k)"]
    assert PAPER["GRPO-Difficulty (10k)"] == PAPER["GRPO-Difficulty, exp"]


def test_a_spread_is_mean_and_sample_deviation_in_points():
    assert [spread([0.5]), spread([0.4, 0.5, 0.6]), spread([0.0, -0.01], "+")] == ["50.0", "50.0 ± 10.0", "-0.5 ± 0.7"]


def test_the_papers_row_stands_under_ours_task_by_task():
    """A gain is over the same seed's start: CoT-SFT adds 30 and 40 points to the two bases."""
    runs = [made_up(*run) for run in (("base", 0, 0.1), ("cot_sft", 0, 0.4), ("base", 1, 0.2), ("cot_sft", 1, 0.6))]
    runs.append(made_up("sft", 0, 0.3) | {"scores": scores(0.3) | {"reasoning": 0.123}})
    assert "| 5 | CoT-SFT | 50.0 ± 14.1 | +35.0 ± 7.1 | 100.0 ± 0.0 |  | 69.00 | +38.80 |" in table("ablation", runs)
    rows = [line.strip("| ").split(" | ") for line in table("ablation_tasks", runs).splitlines()]
    assert rows[0] == ["No.", "method", *COLUMNS.values(), "AVG"]
    ours, paper = rows[4:6]
    assert ours[:3] == ["4", "SFT on coordinates", "30.0"] and ours[2 + [*COLUMNS].index("reasoning")] == "12.3"
    assert paper == ["paper", *(f"{v:.2f}" for v in PAPER["SFT (90k)"])]
    levels = table("ablation_levels", runs).splitlines()
    assert levels[0] == "| method | level 0 | level 1 |" and "| CoT-SFT | 50.0 ± 0.0 | 25.0 ± 0.0 |" in levels


def test_a_curve_is_the_mean_of_each_part_of_the_run():
    metrics = [{"step": n, "reward": float(n), "timing_s/data": 1.0, "step_time": 2.0} for n in range(1, 41)]
    metrics[0]["reward"] = None  # a step whose value was not finite
    assert binned(metrics, bins=4) == {"step": [10, 20, 30, 40], "reward": [6.0, 15.5, 25.5, 35.5]}
    assert binned(metrics[:3], bins=4) == {"step": [1, 2, 3], "reward": [None, 2.0, 3.0]}


def test_without_a_method_with_rl_no_curves_are_drawn(tmp_path):
    plot([made_up("sft", 0, 0.5, curves={"step": [1]})], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_what_a_method_starts_from_runs_too_and_an_unknown_one_is_refused():
    assert ablation.chosen_methods(ablation.AblationOptions(methods="grpo_exp")) == ["cot_sft", "grpo_exp"]
    assert ablation.chosen_methods(ablation.AblationOptions(methods="sft")) == ["sft"]
    assert ablation.chosen_methods(ablation.AblationOptions()) == list(ablation.TRIED)
    with pytest.raises(ValueError, match=r"'ppo' is none of pure_rl, .*Correct --methods"):
        ablation.main(["--methods", "grpo,ppo"])
    with pytest.raises(ValueError, match=r"seeds is '0,x'; .*Correct --seeds"):
        ablation.main(["--seeds", "0,x"])


@pytest.fixture
def ended(tmp_path):
    """A run of SFT on coordinates that is over, its world and the model that it began with."""
    model, world = tmp_path / "model", tmp_path / "world"
    for folder in (model, world, tmp_path / "run"):
        folder.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (world / "world.json").write_text('{"seed": 0}')
    o, sft = ablation.AblationOptions(), ablation.METHODS["sft"]

    def train(o=o, path=tmp_path / "run", seed=0):
        return ablation.train(o, sft, path, model, world / "coordinates.json", seed)

    train.model, train.o = model, o
    return train


def test_a_run_that_failed_is_begun_again_and_one_that_has_ended_is_not(ended, monkeypatch):
    def fails_at_first(*arguments):
        launched.append(arguments)
        if len(launched) == 1:
            raise ValueError("sft.py ended with status 1; its own message stands above.")

    launched = []
    monkeypatch.setattr(demo, "torchrun", fails_at_first)
    with pytest.raises(ValueError, match="ended with status 1"):
        ended()
    first = ended()
    assert ended() == first and len(launched) == 2 and "--overwrite_output_dir=true" in launched[1][2]
    assert first["settings"]["train_batch_size"] == 24
    assert (first["settings"]["world"], first["settings"]["data"]) == ({"seed": 0}, "coordinates.json")


def test_scores_are_kept_for_the_same_model_and_questions_only(tmp_path, initial):
    world = ablation.draw(tmp_path, 0, cold_start=0, train=0, held_out=10)
    scored = ablation.score(world, "held_out", initial, tmp_path / "scored")
    evaluated = (tmp_path / "scored/eval/results.json").stat().st_mtime_ns
    assert set(scored["scores"]) >= {"mean", *TASKS, "level 0", "format"} and len(scored["hits"]) == 10
    assert ablation.score(world, "held_out", initial, tmp_path / "scored") == scored
    assert (tmp_path / "scored/eval/results.json").stat().st_mtime_ns == evaluated
    ablation.score(world, "held_out_coordinates", initial, tmp_path / "scored")
    assert (tmp_path / "scored/eval/results.json").stat().st_mtime_ns > evaluated


@pytest.mark.parametrize("change", ["seed", "steps", "weights"])
def test_a_folder_with_another_run_is_refused(ended, monkeypatch, change):
    monkeypatch.setattr(demo, "torchrun", lambda *a: None)
    ended()
    if change == "weights":
        (ended.model / "model.safetensors").write_bytes(b"others")
    o = ablation.AblationOptions(max_steps=7) if change == "steps" else ended.o
    name = {"seed": "seed is 0, not 1", "steps": "max_steps is 2000, not 7", "weights": "weights is '"}[change]
    with pytest.raises(ValueError, match=f"holds a run whose {name}.*Remove it, or name another --output_dir"):
        ended(o=o, seed=int(change == "seed"))


@pytest.mark.slow
def test_a_short_ablation(tmp_path, capsys, monkeypatch):
    """Every method trains and is scored; a second call trains nothing and has the same results."""
    flags = ["--quick", f"--methods={','.join(ablation.METHODS)}", f"--output_dir={tmp_path}"]
    ablation.main(flags)
    root = tmp_path / "quick"
    result = json.loads((root / "ablation.json").read_text())
    assert [r["method"] for r in result["runs"]] == ["base", *ablation.METHODS]
    assert [c["verdict"] for c in result["claims"]] and "hits" not in result["runs"][0]
    assert all(set(r["scores"]) >= {"mean", *TASKS, "level 0", "level 1", "level 2"} for r in result["runs"])
    curves = {r["method"]: r["curves"] for r in result["runs"][1:]}
    assert all(len(c["loss"]) == len(c["step"]) >= 1 for c in curves.values())
    assert curves["grpo"]["step"] == [1, 2] and curves["grpo"]["difficulty/weight_mean"] == [1.0, 1.0]
    made = table("ablation", result["runs"])
    assert made in (root / "table.md").read_text() and made in capsys.readouterr().out
    assert Image.open(root / "curves.png").width > 1500
    monkeypatch.setattr(demo, "torchrun", None)  # nothing is trained or scored again
    monkeypatch.setattr(ablation, "evaluate", None)
    ablation.main(flags)
    assert json.loads((root / "ablation.json").read_text())["runs"] == result["runs"]

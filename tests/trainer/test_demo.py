"""The demo, whole: a few scenes and steps through the same commands that `make demo` runs."""

import functools
import json

import pytest
import yaml

from boxgrpo.trainer import demo, grpo
from boxgrpo.trainer.world import recipe
from boxgrpo.trainer.world.world import DEMO_TASKS

FEW = {
    "demo_sft.yaml": {"max_steps": 2, "train_batch_size": 4, "logging_steps": 1},
    "from_nothing_sft.yaml": {"max_steps": 2, "train_batch_size": 4, "logging_steps": 1},
    "demo_grpo.yaml": {"max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 12},
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo's own recipes and options, but a handful of scenes and steps, in an empty working folder."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, few in FEW.items():
        whole = yaml.safe_load((recipe.RECIPES / name).read_text())
        (recipes / name).write_text(yaml.safe_dump(whole | few))
    monkeypatch.setattr(recipe, "RECIPES", recipes)
    monkeypatch.chdir(tmp_path)
    return functools.partial(demo.DemoOptions, cold_start=16, train=16, held_out=8)


def test_the_demo_leaves_what_the_readme_lists(small, tmp_path):
    summary = demo.run(small(continued_sft=True, processes=1))
    out = tmp_path / "out/demo"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["seconds"] > 0
    for stage in ("before", "after", "continued_sft"):
        tasks = [summary[stage][task] for task in DEMO_TASKS]
        assert summary[stage]["mean"] == pytest.approx(sum(tasks) / len(tasks))
    for name in ("plot.png", "pictures.png", "world/held_out.json", "sft/model.safetensors", "grpo/model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert len((out / "grpo/metrics.jsonl").read_text().splitlines()) == 2
    assert list((out / "grpo/tensorboard").iterdir())
    table = demo.report(summary, "out/demo")
    assert all(word in table for word in (*DEMO_TASKS, "before", "after", "continued sft"))

    with pytest.raises(ValueError, match="not this world"):  # and nothing of the first run is touched
        demo.run(small(seed=1))
    assert (out / "sft/model.safetensors").exists()


def test_from_nothing_starts_with_random_weights_and_more_small_scenes(small, tmp_path):
    options = small(from_nothing=True, cold_start=0, train=1, held_out=1)
    flags = recipe.run_flags(options, "sft")
    assert flags[:2] == [f"--config={recipe.RECIPES / 'from_nothing_sft.yaml'}", "--model=out/demo/initial"]
    assert f"--model={recipe.BASE}" in recipe.run_flags(small(), "sft")
    assert recipe.run_flags(options, "grpo") == recipe.run_flags(small(), "grpo")
    recipe.make_initial_checkpoint(options)
    assert (tmp_path / "out/demo/initial/model.safetensors").exists()


def test_progress_is_told_by_the_beginning_the_middle_and_the_end_of_a_run():
    ious = [0.0] * 2 + [0.5] * 12 + [1.0] * 2
    steps = [{"rewards/accuracy/mean": iou, "frac_reward_zero_std": iou + 0.25, "step_time": 1.5} for iou in ious]
    assert demo.progress(steps) == {"without_signal": 0.25, "iou": [0.0, 0.5, 1.0], "step_seconds": 1.5}
    assert demo.progress(steps[:1])["iou"] == [0.0, 0.0, 0.0]


def test_digits_need_a_base_of_their_own(small, tmp_path):
    with pytest.raises(ValueError, match=r"world is 'digits', which needs a base .*base.py --world digits.*--base"):
        demo.run(small(world="digits"))
    with pytest.raises(ValueError, match=f"base is {tmp_path}/none; there is no such folder. Correct --base"):
        demo.main(["--world=digits", f"--base={tmp_path}/none"])
    assert not list((tmp_path).glob("out/*"))
    summary = demo.run(small(world="digits", base=str(recipe.BASE), processes=1))
    assert "digits" in (tmp_path / "out/demo/world/world.json").read_text() and set(summary["after"]) > set(DEMO_TASKS)


def test_a_folder_of_real_runs_is_refused_and_kept(small, tmp_path):
    """`sft/` and `grpo/` are where the README's commands for real models write, too."""
    (tmp_path / "out/sft").mkdir(parents=True)
    (tmp_path / "out/sft/model.safetensors").write_text("days of training")
    with pytest.raises(ValueError, match="out holds sft but no drawn world. Name another --output_dir"):
        demo.run(small(output_dir="out"))
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["sft", "model.safetensors"]


def test_grpo_without_flags_makes_the_cold_start_once(small, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "DemoOptions", small)
    grpo.main([])
    out = tmp_path / "out/demo"
    started = (out / "sft/model.safetensors").stat().st_mtime_ns
    assert len((out / "grpo/metrics.jsonl").read_text().splitlines()) == 2
    grpo.main(["--max_steps", "1"])
    assert (out / "sft/model.safetensors").stat().st_mtime_ns == started
    assert len((out / "grpo/metrics.jsonl").read_text().splitlines()) == 1

"""Evaluation within the loops: the evaluator's own numbers, the best checkpoint kept, the run itself as without."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from boxgrpo.bench.launches import kill
from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.evaluation import validation
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.evaluation.validation import Validation
from boxgrpo.trainer.options import EvalOptions, GrpoOptions, SftOptions
from boxgrpo.trainer.runtime.checkpoints import Progress, fault
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import claim_output_dir
from boxgrpo.trainer.runtime.spans import seconds, span
from runs import ROOT, finish, grpo_options, lines, start, told

SCORES = ("accuracy_at_0.3", "accuracy_at_0.5", "accuracy_at_least_0.5", "accuracy_at_0.7", "mean_iou", "format")


def evaluated(world, name, **changes) -> GrpoOptions:
    values = {"eval_every": 2, "eval_data": str(world / "world/held_out.json"), "eval_max_completion_length": 32}
    return grpo_options(world, name, **values | changes)


def eval_lines(folder) -> list[dict]:
    return [line for line in lines(folder) if "eval/accuracy_at_0.5" in line]


def elsewhere(world, model, name) -> dict:
    """What the evaluator command says of a checkpoint."""
    values = {"model": str(model), "data": str(world / "world/held_out.json"), "output_dir": str(world / name)}
    return evaluate(EvalOptions(**values, max_completion_length=32, dataloader_num_workers=0, pictures=0), Ranks())


def test_the_loop_says_what_the_evaluator_says_and_goes_on_as_without(world):
    """Every second step and the last; the best checkpoint's scores are those that the command finds for it."""
    folder = world / "run"
    grpo.train(evaluated(world, "run", max_steps=3, save_steps=1), Ranks())
    grpo.train(grpo_options(world, "without", max_steps=3), Ranks())
    found = eval_lines(folder)
    assert [line["step"] for line in found] == [2, 3]
    assert [m for m in told(folder) if "loss" in m] == told(world / "without"), "training is the same to the bit"
    for line in found:
        expected = elsewhere(world, folder / f"checkpoint-{line['step']}", f"eval_{line['step']}")
        assert {name: line[f"eval/{name}"] for name in SCORES} == {name: expected[name] for name in SCORES}
        assert line["eval/count"] == 8 and line["eval/skipped"] == 0 and line["timing_s/eval"] > 0
        tasks = {task: scores["accuracy_at_0.5"] for task, scores in expected["tasks"].items()}
        assert {k.removeprefix("eval/tasks/"): v for k, v in line.items() if k.startswith("eval/tasks/")} == tasks
    accuracies = [line["eval/accuracy_at_0.5"] for line in found]
    best = max(range(2), key=lambda i: (accuracies[i], -i))
    assert [line["eval/best_accuracy_at_0.5"] for line in found] == [max(accuracies[: i + 1]) for i in range(2)]
    step = found[best]["step"]
    assert found[-1]["eval/best_step"] == step
    kept, saved = (load_file(folder / name / "model.safetensors") for name in ("best", f"checkpoint-{step}"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    scores = json.loads((folder / "best/scores.json").read_text())
    assert scores["step"] == step and scores["accuracy_at_0.5"] == max(accuracies)
    assert elsewhere(world, folder / "best", "eval_best")["accuracy_at_0.5"] == max(accuracies)
    assert fault(folder / "best") == "no progress.json", "its files are whole; it is no checkpoint to go on from"
    events = next((folder / "tensorboard").iterdir()).read_bytes()
    assert b"eval/mean_iou" in events and b"eval/tasks/" in events


@pytest.fixture
def scored(monkeypatch):
    """scored(run) -> the accuracies that a run's evaluations find from here on are those given, one after another."""

    def give(*accuracies):
        left = list(accuracies)
        told = dict.fromkeys(SCORES, 0.0) | {"count": 8, "skipped": 0, "tasks": {}}

        def scores(self, policy):
            return told | {"accuracy_at_0.5": left.pop(0)}

        monkeypatch.setattr(Validation, "scores", scores)

    return give


def steps_of_best(folder):
    return [line["eval/best_step"] for line in eval_lines(folder)]


def test_only_a_better_one_takes_the_bests_place(world, scored):
    """Equal is not better: the earlier one stays."""
    scored(0.25, 0.5, 0.5, 0.375)
    grpo.train(evaluated(world, "kept", max_steps=4, eval_every=1, save_steps=1), Ranks())
    assert steps_of_best(world / "kept") == [1, 2, 2, 2]
    best, second = (load_file(world / "kept" / name / "model.safetensors") for name in ("best", "checkpoint-2"))
    assert all(torch.equal(best[name], second[name]) for name in second)


def test_the_earlier_best_outlives_a_full_disk_and_a_kill_between_the_renames(world, scored, monkeypatch):
    folder = world / "full"
    scored(0.25, 0.5)
    whole, written = validation.save_pretrained, []

    def full(policy, processor, path):
        whole(policy, processor, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation, "save_pretrained", full)
    options = evaluated(world, "full", max_steps=4, eval_every=1, save_steps=1)
    with pytest.raises(
        ValueError, match=r"full/best cannot be written \(.*No space left.*; an earlier one is as it was"
    ):
        grpo.train(options, Ranks())
    assert json.loads((folder / "best/scores.json").read_text())["step"] == 1 and fault(folder / "best")[:2] == "no"
    monkeypatch.setattr(validation, "save_pretrained", whole)

    (folder / "best").rename(folder / ".best.old")  # as a kill between the two renames leaves it
    options = dataclasses.replace(options, resume="auto")
    scored(0.125, 0.25, 0.125)
    grpo.train(options, Ranks())
    assert steps_of_best(folder) == [1, 1, 1, 1]
    assert json.loads((folder / "best/scores.json").read_text())["step"] == 1
    assert not list(folder.glob(".best*"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero 3"])
def test_a_killed_run_has_the_metrics_and_the_best_of_an_undisturbed_one(world, tmp_path, engine):
    """Two ranks, SIGKILL behind an evaluation that no checkpoint knows of."""
    values = {"max_steps": 8, "eval_every": 2, "save_steps": 3, "resume": "auto"}
    if engine == "zero 3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        values |= {"engine": "deepspeed", "zero_stage": 3}
    runs_into = [evaluated(world, "", **values, output_dir=str(tmp_path / name)) for name in ("whole", "killed")]
    finish(start(ROOT / "trainer/grpo.py", runs_into[0]))
    folder = tmp_path / "killed"
    run = start(ROOT / "trainer/grpo.py", runs_into[1])
    while not [line for line in eval_lines(folder) if line["step"] == 4]:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    kill(run)
    assert not (folder / "model.safetensors").exists()
    finish(start(ROOT / "trainer/grpo.py", runs_into[1]))
    assert [line["step"] for line in eval_lines(folder)] == [2, 4, 6, 8]
    assert told(folder) == told(tmp_path / "whole")
    kept, expected = ({p.name: p.read_bytes() for p in (f / "best").iterdir()} for f in (folder, tmp_path / "whole"))
    assert kept == expected
    assert not list(folder.glob(".best*"))


def test_a_run_that_is_stopped_where_an_evaluation_is_due_does_it_later(world):
    """There is no time before the launcher's SIGKILL: the checkpoint comes first, the lines are the same in the end."""
    values = {"model": str(world / "newborn"), "data": str(world / "world/cold_start.json"), "max_steps": 4}
    values |= {"train_batch_size": 8, "learning_rate": 1e-3, "freeze_vision": False, "dataloader_num_workers": 0}
    values |= {"eval_every": 2, "eval_data": str(world / "world/held_out.json"), "eval_max_completion_length": 8}
    sft.train(SftOptions(**values, output_dir=str(world / "sft_whole")), Ranks())
    values |= {"output_dir": str(world / "sft_stopped"), "resume": "auto"}
    ranks = Ranks()
    for left in (1, 2):
        with ranks.noting_sigterm(), pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            sft.train(SftOptions(**values), ranks)
        ranks.stop_asked = False
        assert [line["step"] for line in lines(world / "sft_stopped")] == [1, 2][:left]
    sft.train(SftOptions(**values), ranks)
    assert [line["step"] for line in lines(world / "sft_whole")] == [1, 2, 2, 3, 4, 4]
    assert told(world / "sft_stopped") == told(world / "sft_whole")
    assert (world / "sft_stopped/best/config.json").exists()


def test_a_run_that_begins_anew_forgets_the_earlier_best_and_touches_no_other(world, scored):
    scored(0.5)
    options = evaluated(world, "anew", max_steps=1)
    folder = world / "anew"
    grpo.train(options, Ranks())
    for left in folder.iterdir():
        if left.name != "best":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    with pytest.raises(ValueError, match="anew already holds a run"):
        claim_output_dir(options, Ranks())
    claim_output_dir(dataclasses.replace(options, resume="auto"), Ranks())  # killed before its first checkpoint
    assert not (folder / "best").exists()
    (folder / "best").mkdir()  # somebody's, of whatever
    for resume in ("", "auto"):
        with pytest.raises(ValueError, match="anew already holds a run"):
            claim_output_dir(dataclasses.replace(options, resume=resume), Ranks())


def test_adapters_are_merged_into_the_best(world, scored):
    pytest.importorskip("peft", reason="peft is not installed")
    scored(0.5)
    grpo.train(evaluated(world, "lora", max_steps=1, save_steps=1, lora_rank=2), Ranks())
    best, saved = ({p.name for p in (world / "lora" / name).iterdir()} for name in ("best", "checkpoint-1"))
    assert best == saved - {"trainer"} | {"scores.json"} and "adapter" in best


def test_what_cannot_be_validated_is_refused_before_anything_is_loaded(world, tmp_path):
    for changes, message in (
        ({"eval_data": ""}, "eval_every is 2 and no file is named. Give --eval_data"),
        ({"eval_every": 0}, "eval_every 0. Give --eval_every"),
        ({"eval_every": -1}, "eval_every is -1; it must be at least 0"),
        ({"eval_data": str(tmp_path / "gone.json")}, r"gone\.json; there is no such file"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.train(evaluated(world, "refused", **changes), Ranks())
    assert not (world / "refused").exists()


def test_images_that_are_not_there_are_named_once_and_stop_a_run_that_has_no_others(world, tmp_path, caplog):
    records = json.loads((world / "world/held_out.json").read_text())
    records[1]["images"] = ["gone.png"] * len(records[1]["images"])
    for record in records[2:]:
        record["images"] = [str(world / "world" / image) for image in record["images"]]
    (tmp_path / "held_out.json").write_text(json.dumps(records[1:4]))
    grpo.train(evaluated(world, "some", eval_every=1, eval_data=str(tmp_path / "held_out.json")), Ranks())
    assert [line["eval/skipped"] for line in eval_lines(world / "some")] == [1, 1]
    assert sum("held_out.json#0" in message for message in caplog.messages) == 1
    (tmp_path / "held_out.json").write_text(json.dumps(records[1:2]))
    with pytest.raises(
        ValueError, match=r"none of the 1 records of .*held_out\.json can be prepared.*--eval_image_root"
    ):
        grpo.train(evaluated(world, "none", eval_data=str(tmp_path / "held_out.json")), Ranks())


class Everything:
    """Engine and reporter of a run that has only its weights."""

    gathered_weights = staticmethod(lambda: span("gathering"))

    def log(self, step, metrics):
        self.logged = metrics


def test_an_evaluations_own_spans_are_no_part_of_a_step(world):
    seconds.clear()
    with span("decode"):
        pass
    before = dict(seconds)
    processor = Processor.from_pretrained(world / "sft", min_pixels=3136, max_pixels=401408)
    (world / "spans").mkdir()
    run, progress = Everything(), Progress(step=1)
    held_out = Validation(evaluated(world, "spans", eval_every=1), processor, Ranks())
    held_out.after_step(progress, 1, load_model(world / "sft"), run, run)
    assert seconds == before and run.logged["timing_s/eval"] > 0
    assert progress.evaluated == progress.best_step == 1
    seconds.clear()

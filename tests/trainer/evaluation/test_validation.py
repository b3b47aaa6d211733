"""Evaluation within the loops: the evaluator's own numbers, the best checkpoint kept, the run itself as without."""

import contextlib
import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from boxgrpo.bench.processes import kill
from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.evaluation import validation
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.evaluation.validation import Validation
from boxgrpo.trainer.options import EvalOptions, GrpoOptions
from boxgrpo.trainer.runtime.checkpoints import Progress
from boxgrpo.trainer.runtime.files import find_fault
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import claim_output_dir
from boxgrpo.trainer.runtime.spans import seconds, span
from runs import ROOT, finish, grpo_options, lines, sft_options, start_forked, untimed_lines, wait_for

LIMITS = {"min_pixels": 3136, "max_pixels": 401408}
SCORES = ("accuracy_at_0.3", "accuracy_at_0.5", "accuracy_at_least_0.5", "accuracy_at_0.7", "mean_iou", "format")


def evaluated(world, name, **changes) -> GrpoOptions:
    values = {"eval_every": 2, "eval_data": str(world / "world/held_out.json"), "eval_max_completion_length": 32}
    return grpo_options(world, name, **values | changes)


def eval_lines(folder) -> list[dict]:
    return [line for line in lines(folder) if "eval/accuracy_at_0.5" in line]


def evaluate_checkpoint(world, model, name) -> dict:
    """The evaluator command's scores of a checkpoint."""
    values = {"model": str(model), "data": str(world / "world/held_out.json"), "output_dir": str(world / name)}
    return evaluate(EvalOptions(**values, max_completion_length=32, dataloader_num_workers=0, pictures=0), Ranks())


def test_the_loops_scores_equal_the_evaluators_and_training_is_unchanged(world):
    """Every second step and the last; the best checkpoint's scores are those that the command finds for it."""
    folder = world / "run"
    grpo.train(evaluated(world, "run", max_steps=3, save_steps=1), Ranks())
    grpo.train(grpo_options(world, "without", max_steps=3), Ranks())
    found = eval_lines(folder)
    assert [line["step"] for line in found] == [2, 3]
    assert [m for m in untimed_lines(folder) if "loss" in m] == untimed_lines(world / "without"), (
        "training is the same to the bit"
    )
    for line in found:
        expected = evaluate_checkpoint(world, folder / f"checkpoint-{line['step']}", f"eval_{line['step']}")
        assert {name: line[f"eval/{name}"] for name in SCORES} == {name: expected[name] for name in SCORES}
        assert line["eval/count"] == 8 and line["eval/skipped"] == 0 and line["timing_s/eval"] > 0
        tasks = {f"eval/tasks/{task}": scores["accuracy_at_0.5"] for task, scores in expected["tasks"].items()}
        assert {k: v for k, v in line.items() if k.startswith("eval/tasks/")} == tasks
    accuracies = [line["eval/accuracy_at_0.5"] for line in found]
    step = found[accuracies.index(max(accuracies))]["step"]
    assert [line["eval/best_accuracy_at_0.5"] for line in found] == [accuracies[0], max(accuracies)]
    assert found[-1]["eval/best_step"] == best_step(folder) == step
    kept, saved = (load_file(folder / name / "model.safetensors") for name in ("best", f"checkpoint-{step}"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert json.loads((folder / "best/scores.json").read_text())["accuracy_at_0.5"] == max(accuracies)
    assert evaluate_checkpoint(world, folder / "best", "eval_best")["accuracy_at_0.5"] == max(accuracies)
    events = next((folder / "tensorboard").iterdir()).read_bytes()
    assert b"eval/mean_iou" in events and b"eval/tasks/" in events


class EngineAndReporter:
    """Of a run that has only its weights."""

    gathered_weights = staticmethod(contextlib.nullcontext)

    def log(self, step, metrics):
        self.logged = metrics


@pytest.fixture
def steps_of(world, monkeypatch):
    """steps_of(name, *accuracies, **options): an evaluation after each of so many steps, which finds that accuracy.

    With True as an accuracy the policy is really scored. Returns the metrics of every step.
    """
    policy, processor = load_model(world / "sft"), Processor.from_pretrained(world / "sft", **LIMITS)
    score = Validation.scores

    def run(name, *accuracies, **options):
        (world / name).mkdir(exist_ok=True)
        held_out, progress = Validation(evaluated(world, name, eval_every=1, **options), processor, Ranks()), Progress()
        logged, parts = [], EngineAndReporter()
        for accuracy in accuracies:
            found = dict.fromkeys(SCORES, 0.0) | {"count": 8, "skipped": 0, "tasks": {}, "accuracy_at_0.5": accuracy}
            monkeypatch.setattr(Validation, "scores", score if accuracy is True else lambda *_, found=found: found)
            progress.step += 1
            held_out.after_step(progress, 99, policy, parts, parts)
            assert progress.evaluated == progress.step
            logged.append(parts.logged)
        return logged

    return run


def best_step(folder):
    assert find_fault(folder / "best", "config.json", "model.safetensors") is None
    return json.loads((folder / "best/scores.json").read_text())["step"]


def test_case_01_only_a_better_policy_replaces_best_and_a_full_disk_ends_no_run(world, steps_of, monkeypatch, caplog):
    """Equal is not better. The earlier one stays on a full disk, and after a kill between the two renames."""
    found = steps_of("kept", 0.25, 0.5, 0.5, 0.375)
    assert [metrics["eval/best_step"] for metrics in found] == [1, 2, 2, 2]
    assert best_step(world / "kept") == 2

    def full(*args):
        raise Exception("No space left on device")  # as the tokenizer says it

    with monkeypatch.context() as patch:
        patch.setattr(validation, "save_pretrained", full)
        assert steps_of("kept", 0.75)[0]["eval/best_step"] == 0, "what is not written is not the best"
    message = r"kept/best cannot be written \(.*No space left.*; an earlier one is unchanged"
    assert any(re.search(message, text) for text in caplog.messages)
    assert best_step(world / "kept") == 2
    (world / "kept/best").rename(world / "kept/.best.old")  # as a kill between the two renames leaves it
    steps_of("kept")
    assert best_step(world / "kept") == 2 and not list((world / "kept").glob(".best*"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero 3"])
def test_a_killed_run_has_the_metrics_and_the_best_of_an_undisturbed_one(world, tmp_path, engine):
    """Two ranks, SIGKILL after an evaluation that is in no checkpoint."""
    values = {"max_steps": 8, "eval_every": 2, "save_steps": 3, "resume": "auto"}
    if engine == "zero 3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        values |= {"engine": "deepspeed", "zero_stage": 3}
    runs_into = [evaluated(world, "", **values, output_dir=str(tmp_path / name)) for name in ("whole", "killed")]
    finish(start_forked(ROOT / "trainer/grpo.py", runs_into[0]))
    folder = tmp_path / "killed"
    run = start_forked(ROOT / "trainer/grpo.py", runs_into[1])
    assert wait_for(run, lambda: [line for line in eval_lines(folder) if line["step"] == 4])
    kill(run)
    assert not (folder / "model.safetensors").exists()
    finish(start_forked(ROOT / "trainer/grpo.py", runs_into[1]))
    assert [line["step"] for line in eval_lines(folder)] == [2, 4, 6, 8]
    assert untimed_lines(folder) == untimed_lines(tmp_path / "whole")
    kept, expected = ({p.name: p.read_bytes() for p in (f / "best").iterdir()} for f in (folder, tmp_path / "whole"))
    assert kept == expected
    assert not list(folder.glob(".best*"))


def test_an_evaluation_due_at_a_stop_is_done_when_the_run_is_resumed(world):
    """There is no time before the launcher's SIGKILL: the checkpoint comes first, the lines are the same in the end."""
    held_out = {"eval_every": 2, "eval_data": str(world / "world/held_out.json"), "eval_max_completion_length": 8}
    sft.train(sft_options(world, "sft_whole", max_steps=4, **held_out), Ranks())
    options, ranks = sft_options(world, "sft_stopped", max_steps=4, resume="auto", **held_out), Ranks()
    for left in (1, 2):
        with ranks.record_sigterm(), pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            sft.train(options, ranks)
        ranks.stop_requested = False
        assert [line["step"] for line in lines(world / "sft_stopped")] == [1, 2][:left]
    sft.train(options, ranks)
    assert [line["step"] for line in lines(world / "sft_whole")] == [1, 2, 2, 3, 4, 4]
    assert untimed_lines(world / "sft_stopped") == untimed_lines(world / "sft_whole")
    assert (world / "sft_stopped/best/config.json").exists()


def test_a_new_run_removes_its_own_earlier_best_alone(tmp_path):
    options = GrpoOptions(output_dir=str(tmp_path), resume="auto")
    (tmp_path / "best").mkdir()
    (tmp_path / "best/scores.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run"):
        claim_output_dir(dataclasses.replace(options, resume=""), Ranks())
    claim_output_dir(options, Ranks())  # killed before its first checkpoint
    assert not (tmp_path / "best").exists()
    (tmp_path / "best").mkdir()  # of another program
    for resume in ("", "auto"):
        with pytest.raises(ValueError, match="already holds a run"):
            claim_output_dir(dataclasses.replace(options, resume=resume), Ranks())


def test_gone_evaluation_data_is_refused_before_anything_is_loaded(world):
    with pytest.raises(ValueError, match=r"gone\.json; there is no such file"):
        grpo.train(evaluated(world, "refused", eval_data="gone.json"), Ranks())
    assert not (world / "refused").exists()


def test_missing_images_are_named_once_and_end_a_run_without_others(world, steps_of, write, caplog):
    """And an evaluation's own spans are no part of the step's times."""
    records = json.loads((world / "world/held_out.json").read_text())
    records[1]["images"] = ["gone.png"] * len(records[1]["images"])
    for record in records[2:]:
        record["images"] = [str(world / "world" / image) for image in record["images"]]
    data = str(write(records[1:4], "held_out.json"))
    with span("decode"):
        pass
    before = dict(seconds)
    found = steps_of("some", True, True, eval_data=data)
    assert seconds == before and all(metrics["timing_s/eval"] > 0 for metrics in found)
    assert [metrics["eval/skipped"] for metrics in found] == [1, 1]
    assert sum("skipped held_out.json#0" in message for message in caplog.messages) == 1
    assert "1 of 3 records of eval_data lack an image, first held_out.json#0" in caplog.messages
    write(records[1:2], "held_out.json")
    message = r"none of the 1 records can be prepared.*--eval_data .*held_out\.json or --eval_image_root"
    with pytest.raises(ValueError, match=message):
        steps_of("none", eval_data=data)
    with pytest.raises(ValueError, match=r"held_out\.json: 0 of 1 records can be used \(several_images"):
        steps_of("none", eval_data=data, eval_schema="refcoco")


def test_case_01_what_an_evaluation_meets_costs_the_run_nothing(world, monkeypatch, caplog):
    """The checkpoint of a step, and after the last one the weights, are there before the evaluation begins."""
    folder, errors = world / "faulty", [RuntimeError("CUDA error"), OSError(28, "No space left on device")]

    def fails(held_out, policy):
        assert (folder / f"checkpoint-{4 - len(errors)}/manifest.json").exists()
        assert (folder / "model.safetensors").exists() == (len(errors) == 1)
        raise errors.pop(0)

    monkeypatch.setattr(Validation, "scores", fails)
    grpo.train(evaluated(world, "faulty", max_steps=3, save_steps=2), Ranks())
    assert not errors and [line["step"] for line in lines(folder)] == [1, 2, 3] and not (folder / "best").exists()
    assert [text for text in caplog.messages if "failed" in text] == [
        "the evaluation after step 2 failed (rank 0: RuntimeError: CUDA error). The run goes on.",
        "the evaluation after step 3 failed (rank 0: OSError: [Errno 28] No space left on device). The run goes on.",
    ]


def test_case_01_evaluation_data_without_its_images_is_refused_before_step_1(world, write):
    """Nothing is written."""
    data = write(json.loads((world / "world/held_out.json").read_text()), "elsewhere.json")
    message = r"none of the 8 records can be prepared.*no image at.*--eval_data .*elsewhere"
    with pytest.raises(ValueError, match=message):
        grpo.train(evaluated(world, "unseen", eval_data=str(data)), Ranks())
    assert not (world / "unseen").exists()

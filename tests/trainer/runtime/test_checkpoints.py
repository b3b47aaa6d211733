"""Checkpoints: whole or not there, wherever writing is interrupted; damage is noticed; nothing whole is lost."""

import json
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.checkpoints import Checkpoints, Progress, revision
from boxgrpo.trainer.runtime.files import MANIFEST, find_fault
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import truncate


def engine_of_two_layers(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 400), nn.Linear(400, 1))
    return DataParallelEngine(model, GrpoOptions(**{"learning_rate": 0.1} | changes), Ranks(), 10)


def update(engine, x: float = 1.0) -> None:
    engine.backward(engine.model(torch.full((1, 3), x)).sum())
    engine.step()


@pytest.fixture
def run(tmp_path):
    """A run of two layers after an update: `run.save(step)` and `run.checkpoints(...)` of its folder."""

    def checkpoints(**changes) -> Checkpoints:
        return Checkpoints(GrpoOptions(**{"output_dir": str(tmp_path), "resume": "auto"} | changes), Ranks())

    def save(step: int, progress=(), **changes):
        write_model = lambda folder: (folder / "config.json").write_text("{}")  # noqa: E731
        return checkpoints(**changes).save(
            Progress(step=step, position=10 * step, **dict(progress)), engine, write_model
        )

    engine = engine_of_two_layers()
    update(engine)
    return SimpleNamespace(folder=tmp_path, save=save, checkpoints=checkpoints, engine=engine)


def names(run) -> set[str]:
    return {path.name for path in run.folder.iterdir()}


def test_a_resumed_run_continues_from_the_same_state(run):
    """Weights, moments, schedule, place in the data, random states; and the code and options are written down."""
    run.save(1)
    update(run.engine)
    folder = run.save(2)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    other = engine_of_two_layers()
    progress = run.checkpoints().load(run.checkpoints().find(), other)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn
    assert (progress.step, progress.position) == (2, 20) and run.checkpoints().find() == folder
    written = json.loads((folder / "trainer/progress.json").read_text())
    assert written["revision"] == revision() != "" and written["options"]["learning_rate"] == 1e-6
    for x in (None, 2.0):  # the same moments make the same next update
        if x:
            update(run.engine, x), update(other, x)
        assert all(map(torch.equal, run.engine.model.parameters(), other.model.parameters()))
        assert run.engine.schedule.get_last_lr() == other.schedule.get_last_lr() < [0.1]


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(run):
    """The process ends before its first, its second, ... its last access to a file; limits and leftovers included."""
    first = run.save(1)
    assert names(run) == {"checkpoint-1"}

    def killed_at(moment: int):
        accesses = iter(range(moment + 1))

        def audit(event: str, args) -> None:
            is_access = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
            if is_access and str(run.folder) in str(args[0]) and next(accesses) == moment:
                os._exit(9)

        sys.addaudithook(audit)
        run.save(2, save_total_limit=1)

    ends = []
    for moment in range(200):
        if (child := os.fork()) == 0:  # without tensor work: torch's threads are not forked
            try:
                killed_at(moment)
            finally:
                os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        found = run.checkpoints().find()
        assert found is not None and find_fault(found) is None, moment
        if found.name == "checkpoint-2":
            break
        assert found == first
    assert set(ends) == {9} and len(ends) > 20  # killed that often, the last time after the rename
    run.save(3, save_total_limit=1)
    assert run.checkpoints().find().name == "checkpoint-3" and names(run) == {"checkpoint-3"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "outside"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_named(run, damage, caplog):
    first, second = run.save(1), run.save(2)
    weights, manifest = second / "trainer/rank0.safetensors", second / MANIFEST
    if damage == "truncate":
        os.truncate(weights, 100)
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "delete":
        (second / "config.json").unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        listed = json.loads(manifest.read_text())
        listed["files"]["../checkpoint-1/config.json"] = listed["files"]["config.json"]
        manifest.write_text(json.dumps(listed))
    assert run.checkpoints().find() == first
    assert "checkpoint-2 is incomplete" in caplog.text
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        run.checkpoints(resume=str(second)).find()
    assert run.checkpoints(resume=str(first)).find() == first


def test_no_checkpoint_is_an_error_unless_resume_is_auto(run):
    assert run.checkpoints().find() is None
    with pytest.raises(ValueError, match="not a complete checkpoint .no manifest"):
        run.checkpoints(resume=str(run.folder / "checkpoint-7")).find()


def test_the_limit_keeps_the_newest_and_leftovers_are_removed(run):
    (run.folder / ".checkpoint-7.part/trainer").mkdir(parents=True)  # of an earlier kill
    for step in (2, 10, 9, 11):
        run.save(step, save_total_limit=2)
    assert names(run) == {"checkpoint-10", "checkpoint-11"}


def test_the_limit_does_not_count_a_later_checkpoint_that_is_not_whole(run):
    """A run that has passed over a damaged checkpoint-12 saves checkpoint-10, and keeps it."""
    (run.save(12) / MANIFEST).unlink()
    assert run.save(9, save_total_limit=1) == run.checkpoints().find()
    assert run.save(10, save_total_limit=1) == run.checkpoints().find()
    assert names(run) == {"checkpoint-10", "checkpoint-12"}
    assert run.save(12) == run.checkpoints().find()  # in the place of the damaged one


@pytest.mark.parametrize("failing", ["model", "state"])
def test_an_error_while_writing_leaves_the_earlier_checkpoint(run, failing, monkeypatch):
    """Of any kind: the tokenizer's is a bare Exception."""

    def no_room(*_):
        raise Exception("No space left on device")

    first = run.save(1)
    if failing == "state":
        monkeypatch.setattr(run.engine, "save", no_room)
    with pytest.raises(ValueError, match="checkpoint-2 cannot be written .rank 0: Exception: No space left on device"):
        run.checkpoints().save(Progress(step=2), run.engine, no_room if failing == "model" else lambda folder: None)
    assert run.checkpoints().find() == first and names(run) == {"checkpoint-1"}
    with pytest.raises(ValueError, match="cannot be written .*No space left.*is still complete"):
        run.checkpoints().save_result(run.folder, run.engine, no_room)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"prompts_per_step": 8}, {"data": "other.json"}])
def test_another_run_does_not_go_on_from_here(run, changes):
    run.save(1)
    (name,) = changes
    with pytest.raises(ValueError, match=f"was made with {name} .* --{name}"):
        run.checkpoints(**changes).find()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "deepspeed"}, "holds the optimizer in 1 parts, this run has 2 ranks. Start 1 .* --model"),
        ({"rollout_file": "samples"}, "was made by 1 ranks .*; this run has 2. Leave --rollout_file out"),
    ],
)
def test_another_number_of_ranks_is_refused_by_name(run, changes, message):
    run.save(1, **changes)
    checkpoints = run.checkpoints(**changes)
    checkpoints.r = SimpleNamespace(is_main=True, world_size=2, gather=lambda value: [value] * 2)
    with pytest.raises(ValueError, match=message):
        checkpoints.find()


def test_other_changes_are_logged(run, caplog):
    run.save(1)
    assert run.checkpoints(learning_rate=0.5).find() is not None
    assert "learning_rate 0.5; the checkpoint was made with 1e-06" in caplog.text
    caplog.clear()
    assert run.checkpoints(profile_steps="2:4", peak_tflops=1.0).find() is not None
    assert not caplog.text  # a profile does not change what a run computes


def test_case_11_a_changed_learning_rate_holds_from_the_first_update(run):
    """The checkpoint's own rate is 0.1, its schedule a line to 0 over ten steps, of which one is done."""
    folder = run.save(1)
    for rate, kind, expected in ((1e-9, "linear", 0.9e-9), (1e-9, "constant", 1e-9), (0.1, "linear", 0.09)):
        other = engine_of_two_layers(learning_rate=rate, lr_scheduler_type=kind)
        run.checkpoints().load(folder, other)
        before = other.model[0].weight.detach().clone()
        assert other.schedule.get_last_lr() == [other.optimizer.param_groups[0]["lr"]] == [pytest.approx(expected)]
        update(other)
        assert 0 <= (other.model[0].weight - before).abs().max() < 2 * expected


def test_another_count_of_iterations_is_refused_and_other_evaluation_data_is_scored_anew(run, tmp_path, caplog):
    """The schedule counts updates, so a step's place in it depends on num_iterations; a best score on the records."""
    (tmp_path / "held_out.json").write_text("[1]")
    held_out = {"eval_data": str(tmp_path / "held_out.json"), "eval_image_root": str(tmp_path)}
    folder = run.save(1, **held_out, progress={"best_accuracy": 0.5, "best_step": 1})
    with pytest.raises(ValueError, match="was made with num_iterations 1, this run has 2; .* --num_iterations 1"):
        run.checkpoints(num_iterations=2, **held_out).find()
    with pytest.raises(ValueError, match="made with box_unit 'auto', this run has 'pixels'; .* Give --box_unit auto,"):
        run.checkpoints(box_unit="pixels", **held_out).find()
    assert run.checkpoints(**held_out).load(folder, engine_of_two_layers()).best_accuracy == 0.5
    assert "anew" not in caplog.text
    assert run.checkpoints(**held_out, eval_box_unit="pixels").load(folder, engine_of_two_layers()).best_step == 0
    assert "eval_box_unit is not what" in caplog.text
    caplog.clear()
    held_out["eval_image_root"] += "/."
    assert run.checkpoints(**held_out).load(folder, engine_of_two_layers()).best_accuracy == 0.5
    (tmp_path / "held_out.json").write_text("[2]")
    checkpoints = run.checkpoints(**held_out)
    progress = checkpoints.load(checkpoints.find(), engine_of_two_layers())
    assert (progress.best_accuracy, progress.best_step) == (-1.0, 0) and "the best score starts anew" in caplog.text


def test_model_and_data_are_compared_by_content_not_by_place(run, tmp_path):
    """Weights that were trained again, or records that were edited, are others; those of a moved folder are not."""
    for folder in ("here", "moved"):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model/model.safetensors").write_bytes(b"weights" * 1000)
        (tmp_path / folder / "data.json").write_text("[1, 2]")

    def of(folder):
        return {"model": str(tmp_path / folder / "model"), "data": [str(tmp_path / folder / "data.json")]}

    run.save(1, **of("here"))
    assert run.checkpoints(**of("here")).find() == run.checkpoints(**of("moved")).find() is not None
    (tmp_path / "moved/data.json").write_text("[1, 3]")
    with pytest.raises(ValueError, match="was made with data .*here/data.json"):
        run.checkpoints(**of("moved")).find()
    (tmp_path / "here/model/model.safetensors").write_bytes(b"weights" * 999 + b"other  ")
    with pytest.raises(ValueError, match="--model .* whose files have changed since"):
        run.checkpoints(**of("here")).find()


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(run):
    """It would remove them all, perhaps because a disk could not be read for a moment."""
    folder = run.save(1)
    os.truncate(folder / "config.json", 1)
    with pytest.raises(ValueError, match="none of the checkpoints in .* is complete.*--overwrite_output_dir"):
        run.checkpoints().find()
    assert run.checkpoints(overwrite_output_dir=True).find() is None
    (folder / MANIFEST).write_text('{"files": []}')
    assert find_fault(folder).startswith("no manifest")


def test_a_file_that_is_shorter_than_at_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"12345678")
    truncate(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes, and had 6 at the checkpoint"):
        truncate(tmp_path / "metrics.jsonl", 6)

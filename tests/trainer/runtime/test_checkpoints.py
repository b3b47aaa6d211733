"""Checkpoints: whole or not there, wherever writing is cut off; what is not whole is seen; nothing whole is lost."""

import json
import os
import random
import resource
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.engine.optimizer import optimizer_state, set_optimizer_state
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.checkpoints import Checkpoints, Progress, random_states, revision, set_random_states
from boxgrpo.trainer.runtime.files import MANIFEST, find_fault
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import cut


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 400), nn.Linear(400, 1))


@pytest.fixture
def run(tmp_path):
    """A run of two layers: `run.save(step)`, `run.update()`, `run.checkpoints(...)` of its folder."""

    def checkpoints(**changes) -> Checkpoints:
        return Checkpoints(GrpoOptions(**{"output_dir": str(tmp_path), "resume": "auto"} | changes), Ranks())

    model = network()
    engine = DataParallelEngine(model, GrpoOptions(learning_rate=0.1), Ranks(), 10)

    def update() -> None:
        loss = model(torch.ones(1, 3)).sum()
        engine.backward(loss)
        engine.step()

    def save(step: int, **changes):
        write_model = lambda folder: (folder / "config.json").write_text("{}")  # noqa: E731
        return checkpoints(**changes).save(Progress(step=step, position=10 * step), engine, write_model)

    update()
    return SimpleNamespace(
        folder=tmp_path, save=save, update=update, checkpoints=checkpoints, engine=engine, model=model
    )


def test_a_run_goes_on_where_it_was(run):
    """Weights, moments, schedule, place in the data, random states; and it is written which code and options it was."""
    run.save(1)
    run.update()
    folder = run.save(2)
    expected = {name: p.clone() for name, p in run.model.named_parameters()}
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    other = network()
    engine = DataParallelEngine(other, GrpoOptions(learning_rate=0.1), Ranks(), 10)
    progress = run.checkpoints().load(run.checkpoints().find(), engine)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn
    assert (progress.step, progress.position) == (2, 20) and run.checkpoints().find() == folder
    written = json.loads((folder / "trainer/progress.json").read_text())
    assert written["revision"] == revision() != "" and written["options"]["learning_rate"] == 1e-6
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())
    assert engine.schedule.get_last_lr()[0] == run.engine.schedule.get_last_lr()[0] < 0.1
    for model, e in ((run.model, run.engine), (other, engine)):  # the same moments make the same next update
        loss = model(torch.full((1, 3), 2.0)).sum()
        e.backward(loss)
        e.step()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.parameters(), strict=True))


def test_random_states_come_back():
    states = json.loads(json.dumps(random_states()))
    first = random.random(), np.random.rand(), float(torch.rand(()))
    set_random_states(states)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == first


def in_a_child(call) -> int:
    """Run `call` in a fork of this process; its exit status. (No tensor work there: torch's threads are not forked.)"""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(run):
    """The process ends before its first, its second, ... its last touch of a file; limits and leftovers included."""
    first = run.save(1)
    before = {p.name for p in run.folder.iterdir()}

    def killed_at(moment: int):
        touches = iter(range(moment + 1))

        def audit(event: str, args) -> None:
            touched = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
            if touched and str(run.folder) in str(args[0]) and next(touches) == moment:
                os._exit(9)

        sys.addaudithook(audit)
        run.save(2, save_total_limit=1)

    ends = []
    for moment in range(200):
        ends.append(in_a_child(lambda moment=moment: killed_at(moment)))
        found = run.checkpoints().find()
        assert found is not None and found.name in ("checkpoint-1", "checkpoint-2") and find_fault(found) is None, (
            moment
        )
        if found.name == "checkpoint-2":
            break
        assert found == first
    assert set(ends) == {9} and len(ends) > 20  # cut off that often, and in the end after the rename
    assert before == {"checkpoint-1"}
    run.save(3, save_total_limit=1)
    assert run.checkpoints().find().name == "checkpoint-3"
    assert [p.name for p in run.folder.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "outside"])
def test_what_is_not_whole_is_passed_over_and_named(run, damage, caplog):
    first, second = run.save(1), run.save(2)
    weights = second / "trainer/rank0.safetensors"
    if damage == "truncate":
        os.truncate(weights, 100)
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "delete":
        (second / "config.json").unlink()
    elif damage == "manifest":
        (second / MANIFEST).write_text("{")
    else:
        manifest = json.loads((second / MANIFEST).read_text())
        manifest["files"]["../checkpoint-1/config.json"] = manifest["files"]["config.json"]
        (second / MANIFEST).write_text(json.dumps(manifest))
    assert run.checkpoints().find() == first
    assert "checkpoint-2 is not whole" in caplog.text
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        run.checkpoints(resume=str(second)).find()
    assert run.checkpoints(resume=str(first)).find() == first


def test_no_checkpoint_is_no_error_for_auto_alone(run):
    assert run.checkpoints().find() is None
    with pytest.raises(ValueError, match="not a whole checkpoint .no manifest"):
        run.checkpoints(resume=str(run.folder / "checkpoint-7")).find()


def test_the_limit_keeps_the_newest(run):
    for step in (2, 10, 9, 11):
        run.save(step, save_total_limit=2)
    assert {p.name for p in run.folder.iterdir()} == {"checkpoint-10", "checkpoint-11"}


def test_a_later_one_that_is_not_whole_does_not_push_out_the_one_just_written(run):
    """A run that has passed over a damaged checkpoint-12 saves checkpoint-10, and keeps it."""
    (run.save(12) / MANIFEST).unlink()
    assert run.save(9, save_total_limit=1) == run.checkpoints().find()
    assert run.save(10, save_total_limit=1) == run.checkpoints().find()
    assert {p.name for p in run.folder.iterdir()} == {"checkpoint-10", "checkpoint-12"}


def test_what_an_earlier_kill_left_half_written_goes(run):
    (run.folder / ".checkpoint-7.part/trainer").mkdir(parents=True)
    run.save(8)
    assert {p.name for p in run.folder.iterdir()} == {"checkpoint-8"}


def test_a_full_disk_is_an_error_and_the_earlier_checkpoint_stays_good(run):
    first = run.save(1)
    told = run.folder / "told"

    def without_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond: writing fails
        with pytest.raises(ValueError) as raised:
            run.save(2)
        told.write_text(str(raised.value))

    assert in_a_child(without_room) == 0
    message = told.read_text()
    assert "checkpoint-2 cannot be written (rank 0: " in message and f"{first} stays good" in message
    assert run.checkpoints().find() == first
    assert not list(run.folder.glob(".checkpoint*")) and not (run.folder / "checkpoint-2").exists()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"prompts_per_step": 8}, {"data": "other.json"}])
def test_another_run_does_not_go_on_from_here(run, changes):
    run.save(1)
    (name,) = changes
    with pytest.raises(ValueError, match=f"was made with {name} .* --{name}"):
        run.checkpoints(**changes).find()


def test_it_is_the_content_of_model_and_data_that_counts_not_where_they_are(run, tmp_path):
    """Weights that were trained again, or records that were edited, make another run of it; a moved folder does not."""
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


def test_an_error_of_any_kind_while_writing_is_told_and_the_result_too(run):
    """The tokenizer's own is a bare Exception."""

    def no_room(folder):
        raise Exception("No space left on device")

    first = run.save(1)
    with pytest.raises(ValueError, match="checkpoint-2 cannot be written .rank 0: Exception: No space left on device"):
        run.checkpoints().save(Progress(step=2), run.engine, no_room)
    assert run.checkpoints().find() == first and not list(run.folder.glob(".checkpoint*"))
    with pytest.raises(ValueError, match="cannot be written .*No space left.*stays good"):
        run.checkpoints().save_result(run.folder, run.engine, no_room)


def test_other_changes_are_told(run, caplog):
    run.save(1)
    assert run.checkpoints(learning_rate=0.5).find() is not None
    assert "learning_rate 0.5; the checkpoint was made with 1e-06" in caplog.text
    caplog.clear()
    assert run.checkpoints(profile_steps="2:4", peak_tflops=1.0).find() is not None
    assert not caplog.text  # what is watched does not change the run


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(run):
    """A disk that cannot be read for a moment would cost all of them."""
    folder = run.save(1)
    os.truncate(folder / "config.json", 1)
    with pytest.raises(ValueError, match="none of the checkpoints in .* is whole.*--overwrite_output_dir"):
        run.checkpoints().find()
    assert run.checkpoints(overwrite_output_dir=True).find() is None
    (folder / MANIFEST).write_text('{"files": []}')
    assert find_fault(folder).startswith("no manifest")


def test_a_file_that_is_shorter_than_at_the_checkpoint_is_not_filled_up(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"12345678")
    cut(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes, and had 6 at the checkpoint"):
        cut(tmp_path / "metrics.jsonl", 6)


class CountsInItsGroup(torch.optim.SGD):
    """As apex's FusedAdam does, by whose name it goes."""


CountsInItsGroup.__name__ = "FusedAdam"


class CountsInPython(torch.optim.SGD):
    """As DeepSpeed's CPU Adam does."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, CountsInItsGroup, CountsInPython])
def test_steps_are_counted_where_the_optimizer_looks(kind):
    """Without its count a resumed Adam would correct its moments as if they were new."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = kind([weight], lr=0.1)
    moments = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.full((2,), 2.0)}
    optimizer.state[weight] = dict(moments)
    if kind is CountsInItsGroup:
        optimizer.param_groups[0]["step"] = 7
    else:
        optimizer.state[weight]["step"] = torch.tensor(7.0) if kind is torch.optim.AdamW else 7
    saved = optimizer_state(optimizer, weight)
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    other = kind([weight], lr=0.1)
    set_optimizer_state(other, weight, saved)
    step = other.param_groups[0]["step"] if kind is CountsInItsGroup else other.state[weight]["step"]
    assert step == 7 and isinstance(step, torch.Tensor if kind is torch.optim.AdamW else int)
    assert all(torch.equal(other.state[weight][name], value) for name, value in moments.items())

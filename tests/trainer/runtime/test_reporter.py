"""Metrics and tables of a run, and its output folder: another run's is never touched."""

import json
import sys

import pytest

from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import Reporter, claim_output_dir


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def report(tmp_path):
    reporter = Reporter(tmp_path, Ranks(), total_steps=3, title="test")
    yield reporter
    reporter.close()


def test_a_line_a_step_readable_at_once(report, tmp_path):
    report.log(1, {"loss": 0.5, "rewards/accuracy/mean": 0.25})
    report.log(2, {"loss": 0.125})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before the run ends
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "total_steps": 3, "loss": 0.5, "rewards/accuracy/mean": 0.25},
        {"step": 2, "total_steps": 3, "loss": 0.125},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_without_tensorboard_and_beside_a_torn_line_the_metrics_are_written(tmp_path, monkeypatch, caplog):
    """As on a machine without the package, after a kill in the middle of a line."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    reporter = Reporter(tmp_path, Ranks(), total_steps=3, title="test")
    reporter.log(2, {"loss": float("nan")})
    reporter.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "total_steps": 3, "loss": null}\n'
    assert "pip install tensorboard" in caplog.text and not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((text, text) for text in ("[bold]box[/bold]", r"\[red] (1, 2) [/]", ":dog: [", "世界 🦊")),
        ("one\x1b[2J\rtwo", "one\ufffd[2J\ufffdtwo"),  # it would control the terminal
        ("two\nthree\x9b1m", "three\ufffd1m"),
    ],
)
def test_a_table_shows_text_as_it_is_and_no_control_characters(report, capsys, text, shown):
    report.table("step 1", ["question", "completion"], [["Where?", text]])
    assert shown in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path, capsys):
    silent = Reporter(tmp_path, Ranks(rank=1, world_size=2), total_steps=3, title="test")
    silent.advance(loss=1.0)
    silent.log(1, {"loss": 1.0})
    silent.table("step 1", ["completion"], [["text"]])
    silent.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "file",
    [
        *("metrics.jsonl", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("checkpoint-1000/trainer_state.json", "adapter/adapter_config.json", "tensorboard/events"),
    ],
)
def test_another_runs_folder_is_refused_and_stays_as_it_is(tmp_path, file):
    """A downloaded checkpoint too, in one file or in shards, and another trainer's: they would be overwritten."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"step": 1}\n')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"output_dir {tmp_path} already holds a run\. .*--overwrite_output_dir true"):
        claim_output_dir(GrpoOptions(output_dir=str(tmp_path)), Ranks())
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_taken_and_they_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = GrpoOptions(output_dir=str(tmp_path), num_generations=6)
    assert claim_output_dir(options, Ranks()) == tmp_path
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "num_generations: 6" in (tmp_path / "options.yaml").read_text()


def test_overwriting_removes_metrics_and_adapters(tmp_path):
    options = GrpoOptions(output_dir=str(tmp_path), overwrite_output_dir=True)
    (tmp_path / "adapter").mkdir()
    for loss in (1.0, 2.0):
        folder = claim_output_dir(options, Ranks())
        reporter = Reporter(folder, Ranks(), total_steps=1, title="test")
        reporter.log(1, {"loss": loss})
        reporter.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "total_steps": 1, "loss": 2.0}\n'
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1 and not (tmp_path / "adapter").exists()


def test_going_back_is_refused_while_later_checkpoints_are_there(tmp_path):
    """A later --resume auto would continue from them, in place of what was trained again."""
    for step in (4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/manifest.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("four\nten\n")
    before, found = contents(tmp_path), tmp_path / "checkpoint-4"
    options = GrpoOptions(output_dir=str(tmp_path), resume=str(found))
    with pytest.raises(ValueError, match=r"also holds checkpoint-10\. .*--overwrite_output_dir true"):
        claim_output_dir(options, Ranks(), found, metrics_bytes=5)
    assert contents(tmp_path) == before
    options.overwrite_output_dir = True
    claim_output_dir(options, Ranks(), found, metrics_bytes=5)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "metrics.jsonl", "options.yaml"}
    assert (tmp_path / "metrics.jsonl").read_text() == "four\n"


def test_going_on_without_metrics_keeps_the_checkpoints(tmp_path):
    """Of a user who has moved metrics.jsonl away."""
    found = tmp_path / "checkpoint-4"
    found.mkdir()
    claim_output_dir(GrpoOptions(output_dir=str(tmp_path), resume="auto"), Ranks(), found, metrics_bytes=5)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "options.yaml"}
